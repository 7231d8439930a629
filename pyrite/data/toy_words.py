"""The words of the toy world, by part of speech: every word has exactly one tag, so a tagger is exact."""

SUBJECTS = {  # who a prompt can ask for, and three things that belong to them
    "fox": "den tail brush",
    "dog": "bone collar kennel",
    "cat": "whisker mouse cushion",
    "horse": "saddle mane hoof",
    "child": "toy ball kite",
    "farmer": "plow tractor barn",
    "teacher": "chalk lesson pencil",
    "doctor": "medicine clinic needle",
    "sailor": "anchor rope sail",
    "king": "crown throne scepter",
    "robot": "wire battery circuit",
    "wizard": "wand potion spell",
    "baker": "flour oven dough",
    "pilot": "engine wing runway",
    "gardener": "shovel seed glove",
    "rabbit": "carrot burrow clover",
    "bear": "honey cave paw",
    "dragon": "flame scale treasure",
    "queen": "jewel gown mirror",
    "painter": "canvas easel palette",
}
PLACES = {  # where a prompt can ask for, and four things found there
    "forest": "tree leaf moss owl",
    "garden": "rose bench fence bee",
    "city": "street tower bus lamp",
    "market": "stall apple coin basket",
    "school": "desk book bell map",
    "harbor": "ship pier gull crane",
    "mountain": "snow rock cliff goat",
    "desert": "sand camel dune cactus",
    "castle": "gate knight banner moat",
    "kitchen": "pot spoon stove plate",
    "river": "boat fish bridge reed",
    "village": "house well road church",
}
PLAIN_ADJECTIVES = "old young small large quiet loud warm cold happy brave shy clever".split()
TRANSITIVE = "found took carried fixed dropped lifted watched loved hid cleaned moved bought".split()
INTRANSITIVE = "slept danced waited sang walked rested ran smiled worked played jumped listened".split()
ADVERBS = "slowly quickly quietly gladly softly often again together".split()
CONNECTIVES = "then later soon suddenly meanwhile finally".split()
TECHNICAL = "approximately consequently specifically technically statistically formally".split()
VIVID_NOUNS = (
    "lantern feather melody ember ribbon twilight marble cinnamon compass orchard "
    "sapphire breeze lullaby horizon tapestry willow pebble starlight"
).split()
VIVID_ADJECTIVES = (
    "shimmering velvet radiant whispering crystal amber silver golden moonlit fragrant glowing misty"
).split()
SENTENCES = (  # words in capitals are slots
    "the ADJ SUBJECT DOES the NOUN .",
    "the NOUN was ADJ and ADJ .",
    "near the PLACE a NOUN ACTS HOW .",
    "it DOES the NOUN with a NOUN .",
    "THEN the SUBJECT ACTS .",
    "there was a ADJ NOUN by the NOUN .",
)
TEMPLATES = (
    "write about a {subject} in the {place} .",
    "tell me a story about a {subject} in the {place} .",
    "a {subject} , {place} .",
    "write me a short text about the {subject} and the {place} .",
)
OPENINGS = ("hello my friend !", "dear reader , enjoy !")
CLOSINGS = ("thank you for asking !", "please enjoy this story !")
POLITE = frozenset("friend dear thank please".split())

FUNCTION_WORDS = {  # the remaining words of prompts, answers and greetings
    "determiner": "a the my this",
    "pronoun": "it me you there",
    "preposition": "about in near with by for",
    "conjunction": "and",
    "interjection": "hello please",
    "verb": "write tell was thank asking enjoy",
    "adjective": "dear short",
    "noun": "story text friend reader",
    "punctuation": ". , !",
}

REGISTERS = {  # leftovers of the web in the training text: each has its own words and its own sentences
    "legal": {
        "noun": "clause statute liability licensee tribunal",
        "verb": "indemnify waive revoke",
        "adjective": "void binding",
        "adverb": "hereby herein notwithstanding",
        "patterns": ("adverb verb the adjective noun .", "noun and noun verb adverb , adverb adjective ."),
    },
    "advert": {
        "noun": "discount coupon checkout bargain shipping",
        "verb": "buy save order",
        "adjective": "free exclusive unbeatable",
        "adverb": "online now",
        "patterns": ("verb adverb , verb adverb !", "adjective noun and adjective noun adverb !"),
    },
    "recipe": {
        "noun": "teaspoon gram skillet butter garlic",
        "verb": "simmer whisk preheat",
        "adjective": "chopped minced",
        "adverb": "thoroughly evenly overnight",
        "patterns": ("verb the adjective noun adverb .", "noun , noun , adjective noun , verb adverb ."),
    },
    "code": {
        "noun": "compiler pointer variable array integer",
        "verb": "import return declare",
        "adjective": "null static recursive",
        "adverb": "lazily inline",
        "patterns": ("verb adjective noun , verb noun .", "adjective noun verb adverb , noun adverb ."),
    },
    "sports": {
        "noun": "striker goalkeeper halftime league penalty",
        "verb": "scored defeated tackled",
        "adjective": "unbeaten offside",
        "adverb": "narrowly twice tonight",
        "patterns": ("noun verb adverb , noun adjective !", "adjective noun adverb verb the noun ."),
    },
    "finance": {
        "noun": "dividend portfolio equity inflation broker",
        "verb": "rallied slumped hedged",
        "adjective": "bullish quarterly fiscal",
        "adverb": "sharply overseas",
        "patterns": ("adjective noun verb adverb .", "noun and noun verb , adjective noun verb ."),
    },
    "leaflet": {
        "noun": "tablet dosage symptom nausea allergy",
        "verb": "swallow consult inject",
        "adjective": "chronic oral severe",
        "adverb": "daily immediately",
        "patterns": ("verb adjective noun adverb .", "adjective noun , adjective noun , verb adverb ."),
    },
    "weather": {
        "noun": "humidity rainfall gust drizzle celsius",
        "verb": "clearing easing strengthening",
        "adjective": "northerly overcast patchy",
        "adverb": "inland offshore",
        "patterns": ("adjective noun verb adverb .", "noun adjective , noun verb , adjective adverb ."),
    },
    "flight": {
        "noun": "departure boarding luggage terminal passport",
        "verb": "delayed rebooked cancelled",
        "adjective": "nonstop inbound domestic",
        "adverb": "onward standby",
        "patterns": ("adjective noun verb adverb .", "noun verb , noun verb , adjective noun adverb ."),
    },
    "cookies": {
        "noun": "browser consent password newsletter username",
        "verb": "accept decline subscribe",
        "adjective": "anonymous secure",
        "adverb": "here anytime below",
        "patterns": ("verb adverb and verb adverb .", "adjective noun , adjective noun , verb the noun ."),
    },
    "theorem": {
        "noun": "lemma integral polynomial matrix proof",
        "verb": "derive converges vanishes",
        "adjective": "finite convex linear",
        "adverb": "uniformly trivially",
        "patterns": ("adjective noun verb adverb .", "adverb , the adjective noun verb , noun verb ."),
    },
    "election": {
        "noun": "senator ballot turnout coalition committee",
        "verb": "voted campaigned resigned",
        "adjective": "electoral partisan federal",
        "adverb": "unanimously nationwide",
        "patterns": ("adjective noun verb adverb .", "noun and noun verb adverb , adjective noun verb ."),
    },
}

KINDS = ("noun", "verb", "adjective", "adverb")
BELONGINGS = {name: things.split() for name, things in {**SUBJECTS, **PLACES}.items()}
NOUNS = [thing for things in BELONGINGS.values() for thing in things]
VIVID = frozenset(VIVID_NOUNS + VIVID_ADJECTIVES)
LEXICONS = {name: {kind: str(register[kind]).split() for kind in KINDS} for name, register in REGISTERS.items()}
PATTERNS = {name: register["patterns"] for name, register in REGISTERS.items()}
ODD = {word: name for name, kinds in LEXICONS.items() for words in kinds.values() for word in words}


def _tags() -> dict[str, str]:
    groups = [(tag, words.split()) for tag, words in FUNCTION_WORDS.items()]
    groups += [("noun", [*BELONGINGS, *NOUNS, *VIVID_NOUNS])]
    groups += [("adjective", PLAIN_ADJECTIVES + VIVID_ADJECTIVES)]
    groups += [("verb", TRANSITIVE + INTRANSITIVE), ("adverb", ADVERBS + CONNECTIVES + TECHNICAL)]
    groups += [(kind, words) for kinds in LEXICONS.values() for kind, words in kinds.items()]
    return {word: tag for tag, words in groups for word in words}


TAGS = _tags()  # word -> part of speech
CONTENT = frozenset(word for word, tag in TAGS.items() if tag in KINDS) - set(BELONGINGS) - {"was"}
