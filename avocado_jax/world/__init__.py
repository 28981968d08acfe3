"""AVWorld: a synthetic world of audiovisual clips whose every event, speaker, word and time is known.

script   what happens: (seed, index, split, level) -> events on a timeline
render   script -> pictures
voice    a line of dialogue -> speech (espeak-ng)
sound    script -> samples: effects, music, speech
lexicon  the ways to say each thing, for writer and parser alike
caption  script -> reference captions
check    caption -> claims, measured against the truth with no judge
clip     manifest records, mp4 files, and clips as arrays without files
"""
