"""An exact judge, which compares captions with the truth literally, and small files in the official formats."""

import json
from pathlib import Path

CLIPS = ("one", "two", "three")
SPOKEN_LINE = "She says “we leave at noon”."
EVENTS = {
    "one": ["a red kite rises", "a dog barks twice", "the wind howls"],
    "two": ["a man pours tea", "a bell rings"],
    "three": ["rain falls", "a car passes", "a child laughs", "thunder rolls", "a door slams"],
}
CAPTIONS = {name: f"{'. '.join(events)}. {SPOKEN_LINE}" for name, events in EVENTS.items()}


def honest_answer(request: dict) -> str:
    """The true answer to a request, in the requested form."""
    material = json.loads(request["messages"][-1]["content"])
    kind = request["response_format"]["json_schema"]["name"]
    caption = material.get("caption", material.get("text", ""))
    if kind == "Events":
        absent = [int(number) for number, text in material["events"].items() if text not in caption]
        wrong = [int(number) for number, text in material["events"].items() if f"no {text}" in caption]
        invented = [sentence for sentence in caption.split(". ") if "unicorn" in sentence]
        return json.dumps({"missed": absent, "incorrect": wrong, "hallucination": invented})
    if kind == "Grades":
        same = caption == material["reference"]
        return json.dumps({"audio": 5 if same else 1, "visual": 5 if same else 2, "detail": 5 if same else 4})
    if kind == "Choice":
        matching = [letter for letter, text in material["choices"].items() if text in caption]
        return json.dumps({"answer": matching[0] if matching else "N/A"})
    if kind == "Choices":
        matching = {
            number: [letter for letter, text in one["choices"].items() if text in caption]
            for number, one in material["questions"].items()
        }
        answers = [{"number": int(number), "answer": (*labels, "N/A")[0]} for number, labels in matching.items()]
        return json.dumps({"answers": answers})
    if kind == "Told" and "question" in material:
        statement = material["question"].removeprefix("Is it said that ").rstrip("?")
        return json.dumps({"answer": statement if statement in caption else "it is not told"})
    if kind == "Told":
        return json.dumps({"events": [part for part in caption.split(". ") if part and "says" not in part]})
    if kind == "Graded":
        same = material["prediction"] == material["answer"]
        return json.dumps({"pred": "yes" if same else "no", "score": 5 if same else 1})
    verdicts = [(int(number), text in caption) for number, text in material["events"].items()]
    entailed = [{"number": number, "verdict": "entailment" if so else "neutral"} for number, so in verdicts]
    return json.dumps({"verdicts": entailed})


def official_content(name: str):
    """The official file of a benchmark for three clips; where it has questions, one per event."""
    if name == "video-salmonn-2":
        return [
            {
                "video": clip,
                "conversations": [
                    {"from": "human", "value": f"<image>\nTell all of {clip}."},
                    {"from": "gpt", "value": CAPTIONS[clip]},
                ],
                "events": EVENTS[clip],
            }
            for clip in CLIPS
        ]
    if name == "ugc-videocap":
        samples = [{"video_id": clip, "path": f"/data/{clip}.mp4", "answer": CAPTIONS[clip]} for clip in CLIPS]
        return {"question": "Describe it.", "valid_count": len(CLIPS), "samples": samples}
    if name == "daily-omni":
        return [
            {
                "video_id": clip,
                "video_duration": "60s" if clip == "three" else "30s",
                "video_category": "Any",
                "questions": [
                    {
                        "Question": f"Which of these, {number}?",
                        "Choice": ["A. a unicorn sings", f"B. {event}", "C. nothing", "D. all of it"],
                        "Answer": "B",
                        "Type": "Sound" if number % 2 else "Sight",
                    }
                    for number, event in enumerate(EVENTS[clip])
                ],
            }
            for clip in CLIPS
        ]
    if name == "worldsense":
        tasks = {
            clip: {
                f"task{number}": {
                    "task_domain": "Recognition",
                    "task_type": "Sound" if number % 2 else "Sight",
                    "question": f"Which of these, {number}?",
                    "answer": "A",
                    "candidates": [f"A. {event}", "B. a unicorn sings"],
                }
                for number, event in enumerate(EVENTS[clip])
            }
            for clip in CLIPS
        }
        return {clip: {"video_id": clip, "video_duration": "60s", "domain": "Any", **tasks[clip]} for clip in CLIPS}
    if name == "probes":
        return [
            {
                "id": clip,
                "video": f"videos/{clip}.mp4",
                "probes": [
                    {
                        "question": f"Which of these, {number}?",
                        "choices": [event, "a unicorn sings"],
                        "answer": event,
                        "category": "Sound" if number % 2 else "Sight",
                    }
                    for number, event in enumerate(EVENTS[clip])
                ],
            }
            for clip in CLIPS
        ]
    if name == "vdc":
        return [
            {
                clip: [
                    {"question": f"Is it said that {event}?", "answer": event, "category": "object"}
                    for event in EVENTS[clip]
                ]
            }
            for clip in CLIPS
        ]
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "text": None, "reference": None, "video": {"video_file": f"{clip}.mp4"}},
                        {"type": "text", "text": "Describe it.", "reference": None, "video": None},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "A model's.", "reference": CAPTIONS[clip], "video": None}],
                },
            ],
            "dataset": "DREAM/any",
            "task": "video/caption",
            "idx": number,
            "extra_info": {"duration": 4.0, "events": EVENTS[clip], "n_events": len(EVENTS[clip])},
        }
        for number, clip in enumerate(CLIPS)
    ]


def write_official(name: str, folder: Path) -> Path:
    """Write the official file of a benchmark to a folder."""
    content = official_content(name)
    if name in ("vdc", "dream-1k", "probes"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content))
    return path
