"""AVWorld: synthetic audiovisual clips with known events, speakers, words and times.

vocabulary  shapes, colors, places, effects, lines of dialogue
script      the events of a clip on a timeline, and the claims that they make true
director    (seed, index, split, level) -> script
font        on-screen text
render      script -> frames
voice       line of dialogue -> speech (espeak-ng)
sound       script -> samples: effects, music, speech
lexicon     the phrases for each statement, shared by writer and parser
caption     script -> reference captions
check       caption -> claims, compared with the truth without a judge
clip        manifest records, mp4 files, and clips as arrays without files
tfds_builder  the clips as a TensorFlow Datasets dataset
"""
