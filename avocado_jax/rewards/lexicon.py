"""Word lists of the rewards: forms of one word, and classes of words. English, with a few words of Chinese."""

# Irregular forms and close synonyms of words. Each group is replaced by its first word.
FORMS = """man men he him his himself male guy gentleman|woman women she her hers herself female lady|
child children kid kids|person people|run ran|stand stood|sit sat|hold held|say said|speak spoke spoken speech|
tell told|go went gone goes|come came|take took taken|give gave given|begin began begun start commence|fall fell fallen|
fly flew flown|see saw seen|wear wore worn|write wrote written|drive drove driven|ride rode ridden|sing sang sung|
throw threw thrown|catch caught|lie lay lying|rise rose risen|shake shook shaken|hear heard|
hit hitting|swim swam swum|grey gray|feet foot|hands hand|ring rang rung|blow blew blown|break broke broken|
bring brought|eat ate eaten|wake woke|make made|two 2|three 3|four 4|five 5|six 6|seven 7|eight 8|
nine 9|ten 10|one 1|family families|
big large huge|small little tiny|soft quiet faint gentle|screen frame|appear emerge|show shown display|
jump leap hop|spin rotate turn|bump crash collide|music tune melody song|background backdrop|car vehicle|
picture image photo photograph|road street|smile grin|look gaze stare|glance peek|happy cheerful joyful|
voice narrator narration voiceover presenter announcer"""
# Words without content.
FUNCTION = """a an the this that these those it its it is are was were be been being am and or but so as of in on at to
from by with for into onto over under near off out up down then while when where which who whom whose there here i you
we they them their our your my me us do does did have has had having can could will would shall should may might must
if than also too very just not no nor s t re ve ll d m one some any each other another both such only own same more
most now how what why all because until during after before between through about against again further once
的 了 在 是 和 着 与 也 就 都 而 及 一 个 这 那 有 他 她 它 们 为 以 上 中 到 地 得"""
# Words that contradict each other if exchanged. Each has a weight of at least EXCLUSIVE_WEIGHT.
EXCLUSIVE = """red orange yellow green blue purple violet pink brown black white grey silver gold golden left right top
bottom upper lower above below up down man woman boy girl two three four five six seven eight nine ten first second
third big small loud soft high low fast slow open close inside outside day night
红 橙 黄 绿 蓝 紫 黑 白 左 右 男 女"""
EXCLUSIVE_WEIGHT = 2.5

# Classes of words, each a bit of `vocabulary.Table.classes`.
CLASSES = {
    # words that state that something is spoken
    "SPOKEN": """say says speak tell ask reply respond answer state exclaim narrate continue add adding shout yell
    whisper call cry explain announce declare remark comment murmur mutter sing repeat insist claim note mention warn
    suggest wonder want know question inquire introduce conclude laugh scream voice hear audio sound narration dialogue
    speech remind agree greet chant utter instruct explanation exclamation lament quip joke advise command beg plead
    urge reflect admit confess recall retort sigh gasp groan encourage emphasize confirm interject interrupt reveal
    share express recount chime tease recite rap hum apologize statement conversation banter monologue proclaim inform
    assure order demand scold mumble stammer boast reiterate praise elaborate count
    说 道 问 答 喊 叫 讲 唱 話 言""",
    # verbs after which a colon introduces direct speech without quotation marks
    "SAYS": """say ask reply shout yell whisper answer exclaim respond add adding continue explain announce declare cry
    scream narrate murmur mutter tell sing""",
    # words that state that something is written
    "WRITTEN": """text message word title caption sign label letter lettering logo banner overlay headline inscription
    poster billboard placard hashtag watermark slogan sticker tattoo graphic read written write 字 写 幕""",
    "READ": "read",
    "SUBTITLE": "subtitle",  # written, unless the sentence also has a word of SPOKEN
    "ALOUD": "aloud",
    "NAMING": "call name dub nickname",
    # possible speakers
    "PERSON": """man woman boy girl child person narrator voice host speaker teacher reporter guest mother father mom
    dad son daughter friend crowd audience student doctor singer player coach character comedian officer soldier
    customer chef judge interviewer commentator couple mc poet reader actor actress streamer vlogger instructor driver
    everyone someone interviewee anchor user""",
    "SOURCE": "audio soundtrack",  # sources of speech that are not persons
    "VOICE": "voice",  # describes the speaker only if no other word does
    "GENERIC": "man woman boy girl child person voice speaker someone individual",  # may refer to a known speaker
    "MALE": "man boy father dad son",
    "FEMALE": "woman girl mother mom daughter",
    "OTHER": "other another",
    "DESCRIBING": "in with wear who from dress hold",
    "CONJUNCTION": "and as while when whereas but then before after because where until",
    "AND": "and",
    "SIGHT": "eye",  # "before our eyes" is not a clause
    "ALTERNATIVE": "or 或",
    "NEGATING": """no not never without none nobody nothing dont doesnt didnt isnt arent wasnt werent cant wont instead
    不 没""",
    "DENIAL": "false untrue incorrect",
    "TRUTH": "true case",
    "THAT": "that",
}
PRONOUNS = "he him his himself she her hers herself"  # forms that refer to a man or woman mentioned earlier
