"""AVWorld: a synthetic world of audiovisual clips whose every event, speaker, word and time is known.

vocabulary  what a clip is made of: shapes, colors, places, effects, lines
script      what happens in a clip: events on a timeline, and the claims they make true
director    (seed, index, split, level) -> script
font        written text
render      script -> pictures
voice       a line of dialogue -> speech (espeak-ng)
sound       script -> samples: effects, music, speech
lexicon     the ways to say each thing, for writer and parser alike
caption     script -> reference captions
check       caption -> claims, measured against the truth with no judge
clip        manifest records, mp4 files, and clips as arrays without files
tfds_builder  the same as a TensorFlow Datasets dataset
"""
