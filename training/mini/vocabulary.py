"""What the labels of the training sets are called: one word list for all sets, with synonyms and clashes.

A *concept* is one meaning with several words ("couch": couch, sofa, settee, ...). Every label of every set maps to a
concept. A few labels mean more in one set than in another (VOC's "diningtable" is any table; COCO has both "dining
table" and "table") and have a concept of their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

# Written names -> readable words. Class lists in common use glue words together or append "-other" and "-stuff".
READABLE = {
    "tvmonitor": "tv monitor",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "playingfield": "playing field",
    "waterdrops": "water drops",
    "solid-other": "solid object",
    "structural-other": "structure",
    "window-blind": "window blind",
    "window-other": "window",
    "trafficlight": "traffic light",
    "firehydrant": "fire hydrant",
    "stopsign": "stop sign",
    "parkingmeter": "parking meter",
    "sportsball": "sports ball",
    "baseballbat": "baseball bat",
    "baseballglove": "baseball glove",
    "tennisracket": "tennis racket",
    "wineglass": "wine glass",
    "hotdog": "hot dog",
    "cellphone": "cell phone",
    "teddybear": "teddy bear",
    "hairdrier": "hair drier",
    "chestofdrawers": "chest of drawers",
    "pooltable": "pool table",
    "screendoor": "screen door",
    "coffeetable": "coffee table",
    "kitchenisland": "kitchen island",
    "swivelchair": "swivel chair",
    "arcademachine": "arcade machine",
    "televisionreceiver": "television receiver",
    "dirttrack": "dirt track",
    "conveyerbelt": "conveyor belt",
    "conveyer belt": "conveyor belt",
    "swimmingpool": "swimming pool",
    "tradename": "trade name",
    "crtscreen": "crt screen",
    "bulletinboard": "bulletin board",
}

# Concept -> further words. The concept's own name is always a word too.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": (
        "man",
        "woman",
        "people",
        "child",
        "boy",
        "girl",
        "human",
        "person in shirt",
        "person in jeans",
        "person in dress",
        "person in sweater",
        "person in skirt",
        "person in jacket",
        "astronaut",
        "player",
        "rider",
        "worker",
        "lady",
        "kid",
        "baby",
        "crowd",
    ),
    "bicycle": ("bike", "bicycles", "cycle"),
    "car": ("automobile", "cars", "sedan", "vehicle"),
    "motorcycle": ("motorbike", "motorcycles", "scooter", "moped"),
    "airplane": ("aeroplane", "plane", "aircraft", "airliner", "jet"),
    "bus": ("buses", "coach bus", "double decker bus", "minibus", "tram", "school bus"),
    "train": ("locomotive", "railway train", "subway train", "railcar", "freight train"),
    "truck": ("lorry", "pickup truck", "trucks", "fire truck"),
    "boat": ("boats", "sailboat", "rowing boat", "motorboat", "ship", "canoe", "kayak", "yacht", "ferry"),
    "traffic light": ("traffic signal", "stoplight"),
    "fire hydrant": ("hydrant",),
    "bench": ("park bench",),
    "bird": ("birds", "pigeon", "duck", "goose", "seagull", "chicken", "parrot", "eagle", "swan", "vulture"),
    "cat": ("kitten", "cats", "tabby cat", "kitty"),
    "dog": ("puppy", "dogs", "hound", "terrier", "retriever", "spaniel"),
    "horse": ("horses", "pony", "foal", "mare", "stallion"),
    "sheep": ("lamb", "ram", "flock of sheep"),
    "cow": ("cattle", "bull", "calf", "cows", "ox", "dairy cow", "heifer"),
    "elephant": ("elephants",),
    "bear": ("brown bear", "polar bear"),
    "backpack": ("rucksack",),
    "handbag": ("purse",),
    "tie": ("necktie",),
    "suitcase": ("luggage",),
    "couch": ("sofa", "settee", "loveseat", "divan"),
    "potted plant": ("pottedplant", "houseplant", "plant in a pot", "flowerpot"),
    "tv": ("television", "tv monitor", "tvmonitor", "television monitor", "tv set", "monitor", "screen"),
    "dining table": ("diningtable", "kitchen table"),
    "any table": ("table", "dining table", "diningtable", "kitchen table"),
    "cell phone": ("mobile phone", "phone", "smartphone"),
    "remote": ("remote control",),
    "mouse": ("computer mouse",),
    "keyboard": ("computer keyboard",),
    "donut": ("doughnut",),
    "hair drier": ("hair dryer",),
    "refrigerator": ("fridge",),
    "oven": ("stove",),
    "cup": ("mug", "coffee cup", "teacup", "coffee"),
    "wine glass": ("glass",),
    "building": (
        "buildings",
        "edifice",
        "facade",
        "temple",
        "church",
        "castle",
        "palace",
        "cathedral",
        "pagoda",
        "office building",
        "barn",
    ),
    "house": ("cottage", "villa", "farmhouse"),
    "tree": ("trees", "forest", "pine tree", "oak", "woods", "tree trunk"),
    "bush": ("shrub", "hedge", "thicket"),
    "grass": ("lawn", "meadow", "turf", "pasture"),
    "plant": ("plants", "foliage", "greenery", "fern"),
    "flower": ("flowers", "blossom", "rose", "petal", "bouquet"),
    "sky": ("blue sky",),
    "clouds": ("cloud",),
    "road": ("street", "asphalt", "highway", "roadway", "tarmac"),
    "pavement": ("sidewalk", "footpath"),
    "sidewalk": ("pavement",),
    "ground": ("earth",),
    "dirt": ("soil",),
    "sea": ("ocean",),
    "water": ("pond",),
    "river": ("stream",),
    "mountain": ("mountains", "mountain range"),
    "hill": ("hills",),
    "rock": ("boulder", "rocks", "cliff", "stones"),
    "sand": ("beach", "sands", "dune"),
    "railroad": ("railway tracks", "train tracks"),
    "railing": ("handrail", "rail"),
    "fence": ("fencing",),
    "stairs": ("steps", "staircase", "stair"),
    "wall": ("walls",),
    "brick wall": ("bricks",),
    "wood": ("timber",),
    "wood wall": ("wooden wall",),
    "wood floor": ("wooden floor", "parquet"),
    "floor": ("flooring",),
    "ceiling": (),
    "door": ("doorway",),
    "window": ("windowpane", "windows"),
    "window blind": ("blinds",),
    "curtain": ("drapes", "curtains"),
    "cabinet": ("cabinets", "kitchen cabinet"),
    "cupboard": (),
    "shelf": ("shelves", "bookshelf"),
    "desk": ("writing desk",),
    "table": ("tabletop",),
    "bed": ("mattress",),
    "cake": ("chocolate cake", "pastry", "cupcake"),
    "plate": ("saucer",),
    "leaves": ("leaf",),
    "clothes": ("clothing", "garment", "shirt", "jacket", "coat", "uniform"),
    "cloth": ("fabric",),
    "light": ("lamp",),
    "lamp": ("light source",),
    "rug": ("carpet",),
    "carpet": ("rug",),
    "food": ("meal", "dish"),
    "book": ("books",),
    "sign": ("signboard", "road sign", "signpost"),
    "sign symbol": ("traffic sign", "road sign", "sign"),
    "pole": ("column pole", "post", "lamp post"),
    "pedestrian": ("person walking", "person", "walker", "pedestrians"),
    "bicyclist": ("cyclist", "bike rider", "person on a bicycle"),
    "face": ("head", "human face"),
    "body": ("human body", "torso", "person"),
    "chair": ("chairs", "armchair", "office chair"),
    "bottle": ("bottles", "wine bottle", "glass bottle", "beer bottle", "water bottle", "flask"),
    "playing field": ("sports field", "pitch"),
    "painting": ("picture", "framed picture"),
    "snow": (),
    "structure": ("construction",),
    "solid object": ("object",),
    "bookcase": ("bookshelf",),
    "stove": ("cooker",),
    "television receiver": ("television", "tv"),
}

# (set, label) -> concept, where the plain name does not say enough.
OVERRIDES: dict[str, dict[str, str]] = {
    "voc2012": {
        "aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv",
        "pottedplant": "potted plant", "diningtable": "any table",
    },
    "msrc": {"aeroplane": "airplane"},
    "ade20k150": {"sofa": "couch", "windowpane": "window"},
}  # fmt: skip

# Words that may be meant by the same pixels: never used as wrong answers for each other outside their own set.
CLASHES = (
    "person, body, face, clothes, tie, pedestrian, bicyclist, textile, cloth, apparel",
    "bicyclist, bicycle, person, motorcycle",
    "building, house, skyscraper, wall, brick wall, concrete wall, panel wall, stone wall, tile wall, wood wall, "
    "window, window blind, door, roof, structure, tower, bridge, tent, hovel, awning, canopy, column, stairs, "
    "stage, metal, wood, stone, solid object, railing, cage, screen door, grandstand",
    "road, pavement, sidewalk, ground, dirt, gravel, sand, mud, floor, platform, railroad, land, earth, path, "
    "field, grass, playing field, stone, rock, dirt track, runway, marble floor, stone floor, tile floor, wood "
    "floor, snow, hill, straw, mat, carpet, rug",
    "tree, bush, grass, plant, leaves, branch, flower, moss, straw, palm, vegetable, wood, forest, field, hill, "
    "playing field, potted plant",
    "water, sea, river, lake, waterfall, fountain, water drops, swimming pool, fog",
    "sky, clouds, fog",
    "chair, couch, bench, armchair, seat, furniture, stool, ottoman, pillow, cushion, blanket, swivel chair, bed, "
    "textile, cloth",
    "table, any table, desk, counter, cabinet, cupboard, shelf, furniture, wood, napkin, towel, cloth, textile, "
    "dining table, coffee table, cup, bowl, food, bottle, wine glass, fork, knife, spoon, vase, paper, plastic",
    "tv, laptop, monitor, computer, screen, crt screen, television receiver, light",
    "car, truck, van, bus, train, minibike, motorcycle",
    "sign, banner, poster, signboard, stop sign, traffic light, sign symbol, trade name, paper, metal, pole",
    "pole, metal, fence, railing, light, traffic light, structure, wood, streetlight, banner",
    "bottle, cup, vase, glass, bowl, pot, plastic, metal, wine glass, potted plant",
    "book, paper, shelf, bookcase, cardboard, cupboard",
    "boat, ship, water, sea, river, wood",
    "train, railroad, platform, structure, metal",
    "flower, vase, leaves, plant, potted plant, bush",
    "sheep, cow, horse, straw",
    "airplane, metal, structure",
    "mountain, hill, rock, snow, fog, stone, sky, tree, bush",
    "light, lamp, ceiling",
)


def readable(name: str) -> str:
    """The words a class name stands for: "floor-marble" is a marble floor, "sky-other" is sky."""
    name = name.strip()
    if name in READABLE:
        return READABLE[name]
    base, _, detail = name.partition("-")
    if detail in {"other", "stuff"}:
        return base
    if detail and base in {"wall", "floor", "ceiling"}:
        return f"{detail} {base}"
    return name


def concept_of(set_name: str, label: str) -> str:
    """Concept of a label of a set."""
    key = "voc2012" if set_name.startswith("voc2012") else set_name
    return OVERRIDES.get(key, {}).get(label, readable(label))


def concept_words(concept: str) -> tuple[str, ...]:
    """All words of a concept, its own name first."""
    own = () if concept == "any table" else (concept,)
    return tuple(dict.fromkeys(own + SYNONYMS.get(concept, ())))


def clash_groups() -> list[set[str]]:
    """The groups of `CLASHES` as sets of concept names."""
    return [{name.strip() for name in line.split(",")} for line in CLASHES]


def class_list_words(folder: Path) -> list[str]:
    """Every class name of the JSON files of a folder (``{"names": [[word, ...], ...]}``), as written."""
    words: list[str] = []
    for path in sorted(folder.glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8"))["names"]:
            words.extend(word.strip() for word in group)
    return list(dict.fromkeys(words))


def spelling_variants(word: str) -> list[str]:
    """Glued and hyphenated forms in which a multi-word name may be typed."""
    parts = re.split(r"[ -]", word)
    return [] if len(parts) != 2 else ["".join(parts), "-".join(parts)]
