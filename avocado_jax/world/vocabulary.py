"""The vocabulary of a clip: the values of the slots of its events."""

COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "heart", "ring")
SIZES = {"small": 0.08, "large": 0.125}  # radius as a share of the frame's height
PLACES = {  # center of the shape as a share of the frame's width and height
    "left": (0.18, 0.5),
    "center": (0.5, 0.5),
    "right": (0.82, 0.5),
    "upper left": (0.18, 0.22),
    "lower right": (0.82, 0.78),
    "upper right": (0.82, 0.22),
    "lower left": (0.18, 0.78),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
}
SIDES = ("left", "right", "top", "bottom")
BACKDROPS = ("white", "gray", "black", "cream", "navy")
PATTERNS = ("plain", "striped", "dotted", "checkered")
EFFECTS = {  # seconds
    "bell": 1.2,
    "drum": 0.9,
    "whistle": 0.8,
    "buzzer": 0.7,
    "siren": 1.2,
    "bird": 0.9,
    "clap": 0.8,
    "horn": 0.9,
    "knock": 0.8,
    "harp": 1.0,
    "wind": 1.2,
    "laser": 0.6,
}
BEDS = ("piano", "synth", "drone", "strings", "beat", "music box")
VOICES = {"deep": 1.1, "high": 0.9, "hoarse": 1.0, "whispering": 1.05, "robotic": 1.2}  # relative duration of a line
NARRATOR = "narrator"
CAMERAS = ("pan left", "pan right", "zoom in", "zoom out")
WORDS = ("HELLO", "STOP", "OPEN", "MOON", "EXIT", "MUSIC", "START", "WINTER", "SECRET", "NUMBER")
LINES = (
    "Look at the {}.",
    "Where is the {}?",
    "I can see the {}.",
    "Bring me the {}.",
    "Did you hear the {}?",
    "The {} is over there.",
    "We should follow the {}!",
    "Nobody knows about the {}.",
    "Have you lost your {}?",
    "I left my {} at home.",
    "This {} is very old.",
    "What a beautiful {}!",
)
NOUNS = (
    "moon",
    "boat",
    "garden",
    "dog",
    "river",
    "apple",
    "clock",
    "house",
    "piano",
    "window",
    "letter",
    "king",
)
VISUALS = {  # seconds
    "enter": 1.0,
    "leave": 0.8,
    "move": 0.9,
    "jump": 0.9,
    "spin": 1.0,
    "recolor": 0.6,
    "resize": 0.8,
    "collide": 1.2,
}
IMPACT = 0.5  # when the shapes touch in a collision, as a share of its duration
UTTERANCES = {
    line.format(noun): (i, j) for i, line in enumerate(LINES) for j, noun in enumerate(NOUNS)
}  # text -> (line, noun)
