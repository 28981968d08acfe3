"""Generate scripts: a pure function from (seed, index, split, level) to the events of a clip."""

import random
from dataclasses import replace

from avocado_jax.world.script import (
    LEVELS,
    MAX_SECONDS,
    SPLITS,
    WORLD,
    Actor,
    Claim,
    Event,
    Level,
    Scene,
    Script,
    claims,
    combinations,
    held_out,
    speech_seconds,
)
from avocado_jax.world.vocabulary import (
    BACKDROPS,
    BEDS,
    CAMERAS,
    COLORS,
    EFFECTS,
    IMPACT,
    LINES,
    NARRATOR,
    NOUNS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIDES,
    SIZES,
    VISUALS,
    VOICES,
    WORDS,
)


def make_script(seed: int, index: int, split: str = "train", level: int = 1) -> Script:
    """The script of clip `index`.

    A train clip has no held-out combination (`held_out`) and a test clip has at least one, so the splits share neither
    clips nor held-out combinations.

    Args:
      seed: seed of the world.
      index: number of the clip, from 0.
      split: "train" or "test".
      level: difficulty, an index into `LEVELS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    attempt = 0
    while True:
        rng = random.Random(f"{WORLD}/{seed}/{index}/{split}/{level}/{attempt}")
        script = Director(rng, split, LEVELS[level]).direct(seed, index, level)
        found = any(held_out(c) for event in script.events for c in combinations(event))
        needs = {"say", "cross"} <= {event.kind for event in script.events}
        if needs and found == (split == "test"):
            return script
        attempt += 1


def slots_of(**values: str) -> tuple[tuple[str, str], ...]:
    """The slots of an event, sorted, without empty values."""
    return tuple(sorted((name, value) for name, value in values.items() if value))


class Director:
    """Generates a script; keeps the state of the stage while it draws events."""

    def __init__(self, rng: random.Random, split: str, level: Level):
        self.rng, self.split, self.level = rng, split, level
        self.actors: list[Actor] = []
        self.now: dict[int, tuple[str, str]] = {}  # actor on stage -> (current color, current place)
        self.waiting: list[int] = []  # actors of this scene that have not entered
        self.grown: set[int] = set()
        self.names: set[str] = set()
        self.voiced: set[str] = set()
        self.claimed: set[Claim] = set()
        self.events: list[Event] = []

    def direct(self, seed: int, index: int, level: int) -> Script:
        rng, t, scenes = self.rng, 0.0, []
        beats = self.plan()
        cuts = rng.randint(*self.level.scenes) - 1
        cuts_before = {round(len(beats) * (k + 1) / (cuts + 1)) for k in range(cuts)}
        backdrops = rng.sample(BACKDROPS, cuts + 1)
        for number, kind in enumerate(beats):
            if not number or (number in cuts_before and t < MAX_SECONDS - 12):
                backdrop = backdrops[len(scenes)]
                scenes.append((t, backdrop, self.open_scene(t, len(scenes), backdrop)))
                t = round(t + rng.uniform(0.6, 1.0), 2)
            for _ in range(20):  # draw again if the event is a repetition, is held out or has no free place
                event = getattr(self, kind)(t)
                if event and self.accept(event):
                    t = round(event.end + rng.uniform(0.2, 0.5), 2)
                    break
            if t > MAX_SECONDS - 6:
                break
        duration = max(4.0, -(-(t + 0.2) // 0.5) * 0.5)
        ends = [start for start, *_ in scenes[1:]] + [duration]
        made = tuple(Scene(s, e, b, p) for (s, b, p), e in zip(scenes, ends, strict=True))
        events = [replace(e, end=self.state_end(e, made)) if e.end == e.start else e for e in self.events]
        return Script(seed, index, self.split, level, duration, made, tuple(self.actors), tuple(events))

    def state_end(self, state: Event, scenes: tuple[Scene, ...]) -> float:
        """When a state ends: with its scene, or when the shape first moves away."""
        until = next(scene.end for scene in scenes if scene.end > state.start)
        parts = [part for e in self.events for part in e.parts or (e,)]
        ways = [p.start for p in parts if p.actor == state.actor >= 0 and p.kind in ("move", "leave")]
        return min([until, *ways])

    def plan(self) -> list[str]:
        """The kinds of the beats. Each clip has at least one visual event, one line of dialogue and one "cross"."""
        weights = {"visual": 6, "say": 4, "cross": 4, "effect": 3, "text": self.level.fine, "camera": 0}
        if self.level.camera:
            weights["camera"] = 1
        more = self.rng.randint(*self.level.beats) - 3
        beats = ["visual", "say", "cross", *self.rng.choices(list(weights), weights.values(), k=more)]
        self.rng.shuffle(beats)
        return beats

    def accept(self, event: Event) -> bool:
        """Add an event to the timeline, unless it repeats a claim or is held out for the other split."""
        made = claims(event)
        if self.claimed.intersection(made) or (self.split == "train" and any(held_out(c) for c in combinations(event))):
            return False
        self.claimed.update(made)
        self.events.append(event)
        for part in event.parts or (event,):
            self.update_stage(part)
        return True

    def update_stage(self, event: Event) -> None:
        """Update the state of the stage after an event."""
        if event.actor < 0 or event.kind not in (*VISUALS, "present"):
            if event.kind == "say":
                self.voiced.add(event.get("who"))
            return
        color, position = self.now.get(event.actor, (self.actors[event.actor].color, ""))
        position = event.get("place") or position
        if event.kind == "recolor":
            color = event.get("color")
            self.names.add(f"{color} {self.actors[event.actor].shape}")
        if event.kind == "enter":
            self.waiting.remove(event.actor)
        if event.kind == "resize":
            self.grown.add(event.actor)
        self.now[event.actor] = (color, position)
        if event.kind == "leave":
            del self.now[event.actor]

    def open_scene(self, t: float, number: int, backdrop: str) -> str:
        """Start scene `number`; returns the pattern of its background."""
        rng, level = self.rng, self.level
        pattern = rng.choice(PATTERNS) if level.fine else "plain"
        slots = slots_of(backdrop=backdrop, pattern=pattern)
        self.events.append(Event("cut" if number else "scene", t, t, slots))
        self.now, self.waiting = {}, []
        free = [c + " " + s for c in COLORS[: level.colors] for s in SHAPES[: level.shapes]]
        cast = []
        for _ in range(rng.randint(*level.cast)):
            used = {name.split()[1] for name in cast}  # the shapes of a scene differ, as far as possible
            names = [n for n in free if n not in self.names and n.split()[1] not in used]
            cast.append(rng.choice(names))
            self.names.add(cast[-1])
        voices = rng.sample(list(VOICES)[: level.voices], min(len(cast), level.voices))
        present = len(cast) - (rng.random() < 0.4)
        for k, name in enumerate(cast):
            color, shape = name.split()
            voice = voices[k % len(voices)]
            self.actors.append(Actor(color, shape, rng.choice(list(SIZES)), voice, number))
            who = len(self.actors) - 1
            if k < present:
                actor, position = self.actors[who], self.free_position()
                slots = slots_of(size=actor.size, who=name, place=position)
                self.accept(Event("present", t, t, slots, who))
            else:
                self.waiting.append(who)
        if level.fine and rng.random() < 0.7:
            bed = slots_of(bed=rng.choice(BEDS), loudness=self.loudness())
            self.accept(Event("bed", t, t, bed))
        return pattern

    def free_position(self) -> str:
        taken = {position for _, position in self.now.values()}
        free = [p for p in list(PLACES)[: self.level.places] if p not in taken]
        return self.rng.choice(free) if free else ""

    def loudness(self) -> str:
        return self.rng.choice(("soft", "loud")) if self.level.fine else ""

    def visual(self, t: float) -> Event | None:
        rng = self.rng
        likely = {"enter": 4, "leave": 0.5}  # keep several shapes on stage, so that captions must distinguish speakers
        kind = rng.choices(list(VISUALS), [likely.get(kind, 1) for kind in VISUALS])[0]
        if kind == "enter":
            position = self.free_position()
            if not self.waiting or not position:
                return None
            who = self.waiting[0]
            size, name = self.actors[who].size, self.actors[who].name
            slots = slots_of(size=size, who=name, side=rng.choice(SIDES), place=position)
            return Event(kind, t, round(t + VISUALS[kind], 2), slots, who)
        if not self.now:
            return None
        who = rng.choice(list(self.now))
        actor, (color, _) = self.actors[who], self.now[who]
        name, other, extra = f"{color} {actor.shape}", -1, {}
        if kind == "leave":
            if len(self.now) < 2:
                return None
            extra["side"] = rng.choice(SIDES)
        elif kind == "move":
            extra["place"] = self.free_position()
            if not extra["place"]:
                return None
        elif kind == "spin":
            if actor.shape in ("circle", "ring"):  # their rotation is invisible
                return None
            extra["turn"] = rng.choice(("clockwise", "counterclockwise")) if self.level.fine else ""
        elif kind == "recolor":
            new = [c for c in COLORS[: self.level.colors] if f"{c} {actor.shape}" not in self.names]
            if not new:
                return None
            extra["color"] = rng.choice(new)
        elif kind == "resize":
            if who in self.grown:
                return None
            extra["resize"] = "grow" if actor.size == "small" else "shrink"
        elif kind == "collide":
            if len(self.now) < 2:
                return None
            other = rng.choice([k for k in self.now if k != who])
            extra["other"] = f"{self.now[other][0]} {self.actors[other].shape}"
        end = round(t + VISUALS[kind], 2)
        return Event(kind, t, end, slots_of(who=name, **extra), who, other)

    def effect(self, t: float) -> Event:
        effect = self.rng.choice(list(EFFECTS)[: self.level.effects])
        slots = slots_of(effect=effect, loudness=self.loudness())
        return Event("effect", t, round(t + EFFECTS[effect], 2), slots)

    def cross(self, t: float) -> Event | None:
        """A visual event and a simultaneous effect (in a collision, when the shapes touch)."""
        visual = self.visual(t)
        if visual is None:
            return None
        later = IMPACT * VISUALS["collide"] if visual.kind == "collide" else 0.0
        sound = self.effect(round(t + later, 2))
        return Event("cross", t, max(visual.end, sound.end), (), visual.actor, visual.other, (visual, sound))

    def say(self, t: float) -> Event | None:
        rng, level = self.rng, self.level
        who = rng.choice([*self.now, -1] if level.long_lines else list(self.now))
        shape = "" if who < 0 else f"{self.now[who][0]} {self.actors[who].shape}"
        voice = NARRATOR if who < 0 else self.actors[who].voice
        line = self.sentence()
        if level.long_lines and rng.random() < 0.3:
            line += " " + self.sentence()
        described_voice = "" if who < 0 or shape in self.voiced else voice  # described at a speaker's first line
        slots = slots_of(who=shape or NARRATOR, line=line, voice=described_voice)
        return Event("say", t, round(t + speech_seconds(line, voice), 2), slots, who)

    def sentence(self) -> str:
        line, noun = LINES[: self.level.lines], NOUNS[: self.level.nouns]
        return self.rng.choice(line).format(self.rng.choice(noun))

    def text(self, t: float) -> Event:
        slots = slots_of(word=self.rng.choice(WORDS), where=self.rng.choice(("top", "bottom")))
        return Event("text", t, round(t + 1.8, 2), slots)

    def camera(self, t: float) -> Event:
        return Event("camera", t, round(t + 1.8, 2), slots_of(camera=self.rng.choice(CAMERAS)))
