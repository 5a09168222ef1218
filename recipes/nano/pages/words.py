"""Draws what is written on the pages: words, names, amounts, dates, codes and the labels that go with them.

Words belong to one split for good: a word whose hash says "test" is never drawn for training. Labels, months and the
names of shapes are shared, because questions name them. Numbers and codes are random and shared.
"""

# ruff: noqa: SIM905  (lists of words are easier to read and to extend as text)
from random import Random

from recipes.nano.pages.fonts import fingerprint

_COMMON = """
able acid acre actor adult agent album amber anchor angle ankle apple april apron arch arena arrow artist atlas attic
autumn award badge baker ballet bamboo banana banner barley barrel basin basket beach beacon beetle bench berry
bicycle bishop blanket blossom border bottle boulder bracket branch bread breeze brick bridge bronze bucket budget
buffalo bundle butter button cabin cable cactus camel camera candle canoe canvas canyon captain carbon carpet castle
cattle cedar cellar chalk chapel cherry chess chimney cinema circus citrus clinic clover cobalt cobra coffee collar
comet compass concert copper coral corner cotton cousin cradle crane cricket crown crystal curtain cushion daisy
dancer dealer decade delta dentist desert diamond dinner doctor dolphin donkey dragon drawer eagle echo editor elbow
elder ember engine entry estate evening fabric falcon farmer feather fennel ferry fiddle field figure filter finger
flag flame flute forest fossil fountain fox frame frost fruit galaxy garden garlic gate gazette ginger glacier glass
glove goat golden granite grape gravel guitar hammer harbor harvest hazel hedge helmet hermit heron hollow honey
horizon hotel hunter iceberg icon indigo island ivory jacket jasmine jewel journal jungle juniper kettle kitchen
kitten ladder lagoon lake lantern laurel lawyer leather lemon lentil letter library lilac lily linen lizard lobster
locker lotus lumber magnet mango maple marble market meadow medal melon merchant meteor mill mirror mitten monkey
morning mosaic motor mountain museum mustard nectar needle nickel north nurse oasis ocean olive onion opera orange
orbit orchid otter oven oyster paddle palace panda paper parade parcel parrot pasture peach pearl pebble pelican
pencil pepper piano pigeon pillow pilot pine pirate planet plaza plum pocket poet polar pond poplar potato prairie
prism puzzle quarry quartz quill rabbit radar radio raven reef ribbon river robin rocket rose ruby saddle saffron
sailor salmon sandal satin scarf school season shadow shell shelter silver sister sketch smoke snow socket sonnet
spark spice spider spring spruce squash stable station stone storm studio sugar summer sunset swan table tailor tango
teapot temple tennis theater thistle thunder ticket tiger timber tomato topaz torch tower tractor trade train tulip
tunnel turkey turtle tutor valley vanilla velvet vessel village violet violin visitor volcano voyage wagon walnut
walrus water wheat whistle willow window winter wizard wolf wonder yacht yellow zebra zenith zigzag zone
""".split()
_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
_VOWELS = "a e i o u a e i o ai ea ee ia io oa ou".split()
_CODAS = "  b ck d g k l ll m n nd ng nt p r rd rk rn s sh st t th x z".split(" ")
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

LABELS: dict[str, list[str]] = {
    kind: text.split(",")
    for kind, text in {
        "amount": "Total,Subtotal,Tax,Tip,Balance,Price,Amount,Due,Paid,Fee,Cost,Change,Cash,Card,Sum,Net,Gross,Refund,"
        "Deposit,Rent,Fare,Bonus,Budget,Profit,Sales,Amount due,Grand total,Unit price",
        "number": "Invoice,Order,Account,Customer,Room,Seat,Table,Ticket,Page,Batch,Lot,Serial,Bus,Track,Box,Platform,"
        "Route,Locker,Qty,Items,Score,Weight,Height,Speed,Age,Floor,Unit,Stock,Points,Visits,Members,"
        "Order No,Invoice No",
        "date": "Date,Issued,Expires,Born,Start,End,Delivered,Printed,Signed,Opened,Updated,Deadline,Due date",
        "phone": "Tel,Phone,Fax,Mobile,Call",
        "name": "Name,City,Street,Clerk,Cashier,Author,Dept,Company,Contact,Item,Manager,Guest,Driver,Client,Brand,"
        "Colour,Country,Teacher,Owner,Team,First name",
        "percent": "Discount,VAT,Rate,Growth,Share,Interest,Humidity",
        "time": "Time,Departs,Arrives,Opens,Closes,Begins,Checkout,Boarding",
        "code": "Gate,Flight,Ref,Code,Model,Zone,Bin,Bay,Aisle,Version,Plate,Coupon,Booking,Class",
    }.items()
}
NUMBERED = frozenset(LABELS["number"][:18])  # "the invoice number" is what stands after "Invoice:"
VALUE_TYPES = tuple(LABELS)


def split_of(word: str) -> str:
    """The split a word belongs to, whatever its case: one in five is kept for the test."""
    return "test" if fingerprint(word.lower()) % 5 == 0 else "train"


_BY_SPLIT = {split: [w for w in _COMMON if split_of(w) == split] for split in ("train", "test")}


def _pseudo(rng: Random, syllables: int) -> str:
    pick = rng.random
    parts = []
    for _ in range(syllables):
        parts.append(_ONSETS[int(pick() * len(_ONSETS))] + _VOWELS[int(pick() * len(_VOWELS))])
    return "".join(parts) + _CODAS[int(pick() * len(_CODAS))]


def word(rng: Random, split: str, longest: int = 12) -> str:
    """A lower-case word of the split, of 3 to `longest` letters: from the list, or of random syllables.

    In training one in five is of random letters: what cannot be guessed has to be read.
    """
    while True:
        r = rng.random()
        if r < 0.3:
            found = rng.choice(_BY_SPLIT[split])
        elif r < 0.5 and split == "train":
            found = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 7))).lower()
        else:
            found = _pseudo(rng, 1 if rng.random() < 0.3 else 2)
        if split_of(found) == split and 3 <= len(found) <= longest:
            return found


def cased(rng: Random, text: str) -> str:
    """`text` as it is, capitalised, or in capitals."""
    r = rng.random()
    return text.capitalize() if r < 0.5 else text if r < 0.75 else text.upper()


def name(rng: Random, split: str, longest: int = 12) -> str:
    """A capitalised word of the split, sometimes with an initial."""
    if longest >= 8 and rng.random() < 0.15:
        return f"{rng.choice(_LETTERS)}. {word(rng, split, longest - 3).capitalize()}"
    return word(rng, split, longest).capitalize()


def amount(rng: Random) -> str:
    """Money: "42.10", "$7.99", "1,204.50", "(18.00)", "$350"."""
    r = rng.random()
    cents = f"{rng.randrange(100):02d}"
    whole = rng.randrange(10 ** rng.randint(1, 3))
    if r < 0.5:
        return f"{whole}.{cents}"
    if r < 0.7:
        return f"${whole}.{cents}"
    if r < 0.85:
        return f"{rng.randint(1, 99)},{rng.randrange(1000):03d}.{cents}"
    return f"({whole}.{cents})" if r < 0.9 else f"${whole}"


def number(rng: Random) -> str:
    """An integer of one to seven digits, rarely with a decimal or a sign."""
    text = str(rng.randrange(10 ** rng.randint(1, 7)))
    r = rng.random()
    return f"{text}.{rng.randrange(10)}" if r < 0.08 else f"-{text}" if r < 0.12 else f"#{text}" if r < 0.17 else text


def date(rng: Random) -> str:
    """A date in one of eight formats, at most 12 characters."""
    day, month, year = rng.randint(1, 31), rng.randint(1, 12), rng.randint(1900, 2049)
    short = MONTHS[month - 1]
    return (
        f"{day} {short} {year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{day:02d}/{month:02d}/{year}",
        f"{day:02d}.{month:02d}.{year}",
        f"{short} {day}, {year}",
        f"{month}/{day}/{year % 100:02d}",
        f"{day} {short}",
        f"{short} {year}",
    )[rng.randrange(8)]


def phone(rng: Random) -> str:
    """A telephone number of at most 12 characters."""
    a, b = rng.randrange(1000), rng.randrange(10000)
    return (f"555-{b:04d}", f"{a:03d}-{b:04d}", f"({a:03d}) {b:04d}", f"+{a % 90 + 1} {b:04d}")[rng.randrange(4)]


def code(rng: Random) -> str:
    """A random code: "B12", "A93-2", "XK-4471", "7QD2"."""
    letters = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 3)))
    digits = str(rng.randrange(10 ** rng.randint(1, 4)))
    r = rng.random()
    if r < 0.35:
        return letters + digits
    if r < 0.6:
        return f"{letters}-{digits}"
    if r < 0.75:
        return f"#{letters}{digits}-{rng.randrange(10)}"
    if r < 0.85:
        return f"{digits}{letters}"
    if r < 0.92:
        return f"{letters}/{digits}"
    return "".join(rng.choice(_LETTERS + "0123456789") for _ in range(rng.randint(3, 7)))


def percent(rng: Random) -> str:
    """ "7%", "12.5%"."""
    return f"{rng.randrange(100)}%" if rng.random() < 0.6 else f"{rng.randrange(100)}.{rng.randrange(10)}%"


def clock(rng: Random) -> str:
    """ "14:05", "9:30 am"."""
    if rng.random() < 0.7:
        return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    return f"{rng.randint(1, 12)}:{rng.randrange(60):02d} {rng.choice(('am', 'pm', 'AM', 'PM'))}"


def value(rng: Random, split: str, kind: str) -> str:
    """A value fit for a label of the given type, at most 12 characters."""
    if kind == "name":
        return name(rng, split, 10)
    if kind == "number" and rng.random() < 0.1:
        return f"{rng.randrange(10 ** rng.randint(1, 4))} {rng.choice(('kg', 'km', 'g', 'm', 'cm', 'ml', 'pcs', 'mm'))}"
    makers = {"amount": amount, "number": number, "date": date, "phone": phone,
              "percent": percent, "time": clock, "code": code}  # fmt: skip
    return makers[kind](rng)


def labels(rng: Random, split: str, count: int) -> list[tuple[str, str]]:
    """`count` different (label, value type) pairs; some labels are words of the split and must be read to be found."""
    chosen: dict[str, tuple[str, str]] = {}
    while len(chosen) < count:
        kind = VALUE_TYPES[int(rng.random() * len(VALUE_TYPES))]
        label = word(rng, split, 8).capitalize() if rng.random() < 0.3 else rng.choice(LABELS[kind])
        chosen.setdefault(label.lower(), (label, kind))
    return list(chosen.values())
