"""The prompts of the signs: which words, in which sentences, and the plan that may come before the picture.

Held-out words occur neither in pretraining nor in reinforcement learning; validation words do in pretraining alone.

    python -m stage.shapes.sign_prompts        writes assets/signs_*.jsonl
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

from stage.shapes.signs import ROWS, SCHEMES

MEDIA = ("sign", "poster", "label", "plate", "card", "banner")
VERBS = ("that says", "that reads")
FORMS = tuple(f'a {medium} {verb} "{{}}"' for medium, verb in itertools.product(MEDIA, VERBS))
INSTRUCTION = " plan :"  # after the prompt where a plan is asked for
TAG = "ocr"

_LIST = """
    AM AN AS AT BE BY DO GO HE HI IF IN IS IT ME MY NO OF OH OK ON OR OX SO TO UP US WE
    ACE ADD AGE AIR ALL AND ANT ANY APE ARM ART ASK BAD BAG BAR BAT BAY BED BEE BIG BIT BOW BOX BOY BUD BUG BUN BUS BUY
    CAB CAN CAP CAR CAT COG COT COW CRY CUB CUP CUT DAY DEN DIG DIP DOG DOT DRY EAR EAT EGG ELF ELM END ERA EYE FAN FAR
    FAX FEW FIG FIN FIT FIX FLY FOG FOX FUN FUR GAP GAS GEM GUM GYM HAM HAT HAY HEN HER HIM HIP HOP HOT HUB HUG HUT ICE
    INK INN IVY JAM JAR JET JOB JOG JOY JUG KEY KID KIT LAB LAP LEG LET LIP LOG LOT LOW MAP MAT MIX MOP MUD MUG NAP NET
    NEW NOD NOW NUT OAK OAR OIL OLD ONE OUR OUT OWL OWN PAN PAW PEA PEN PET PIE PIN POD POT PUT RAG RAM RAY RED RIB ROD
    ROW RUG RUN SAW SEA SET SHE SIT SIX SKI SKY SOY SUN TAG TAP TAX TEA TEN TIE TIN TIP TOE TOP TOY TRY TUB TWO URN USE
    VAN VET WAX WAY WEB WET WHO WIG WIN YAK YES YET ZIP ZOO
    ABLE ARCH AREA ATOM BABY BACK BAKE BALL BAND BANK BARN BASE BEAN BEAR BELL BELT BIKE BIRD BLUE BOAT BOLD BOOK BOOT
    BOWL BULB CAGE CAKE CALM CAMP CAVE CITY CLAY CLUB COAL COAT COIN COLD COOK COOL CORN CROW CUBE DARK DATE DAWN DECK
    DEEP DEER DESK DISH DOCK DOOR DOVE DRUM DUCK DUNE DUST EAST ECHO EDGE EXIT FACE FARM FAST FERN FILM FIRE FISH FIVE
    FLAG FOAM FOLK FOOD FORK FOUR FREE FROG GAME GATE GIFT GLOW GOAT GOLD GOLF GRID GULF HALF HALL HAND HARP HAWK HELP
    HERO HIGH HILL HOME HOOD HOPE HORN IDEA IRIS IRON JAZZ JUMP JURY KEEP KIND KING KITE KIWI KNOT LAKE LAMP LAND LAVA
    LEAF LIFT LIME LINE LION LOOP LUCK MAIN MAPS MAZE MEAL MENU MILK MINT MOON MOSS NAIL NEST NEXT NINE NODE OATS
    OPEN ORCA OVEN PAGE PALM PARK PATH PEAK PEAR PINE PLUM POEM POND PONY POOL PORT QUIZ RACE RAIN REEF RICE RING ROAD
    ROCK ROOF ROOM ROPE ROSE RUBY SAFE SAIL SALE SALT SAND SEED SHIP SHOE SHOP SILK SLOW SNOW SOAP SOFA SONG SOUP STAR
    STOP SURF SWAN TAXI TEAM TENT TIDE TIME TOWN TREE TUNA TUBE VASE VIEW VINE WALK WALL WARM WAVE WEST WIND WOLF WOOD
    WORD YARD YARN YEAR YOGA ZERO ZONE
    """
WORDS = tuple(_LIST.split())

Line = dict[str, str]


def ask(word: str, form: int) -> str:
    """The prompt for a word, in FORMS[form]."""
    return FORMS[form].format(word)


def plan(word: str, scheme: int, row: int) -> str:
    """The plan of a sign, as it follows the prompt and INSTRUCTION: what the board looks like, then each letter."""
    board, ink = SCHEMES[scheme]
    return f" board {board} letters {ink} {ROWS[row]} {' '.join(word)}"


def _shuffle_key(word: str) -> bytes:
    """An order that depends on the word alone, so that a split does not change when words are added elsewhere."""
    return hashlib.blake2b(word.encode(), digest_size=8).digest()


def word_splits(share: int = 8) -> dict[str, tuple[str, ...]]:
    """Words by split: one in `share` of each length is held out, one in `share` is for validation."""
    found: dict[str, tuple[str, ...]] = {"train": (), "validation": (), "heldout": ()}
    for length in sorted({len(word) for word in WORDS}):
        words = tuple(sorted((word for word in WORDS if len(word) == length), key=_shuffle_key))
        part = len(words) // share
        found["heldout"] += words[:part]
        found["validation"] += words[part : 2 * part]
        found["train"] += words[2 * part :]
    return found


def splits() -> dict[str, list[Line]]:
    """Prompts by split: every word in two forms, which the word decides."""
    return {
        name: [
            {"tag": TAG, "prompt": ask(word, (_shuffle_key(word)[0] + half * len(FORMS) // 2) % len(FORMS))}
            for half in (0, 1)
            for word in words
        ]
        for name, words in word_splits().items()
    }


def main() -> None:
    """Writes the three files that training and evaluation read."""
    folder = Path(__file__).parent / "assets"
    for name, lines in splits().items():
        path = folder / f"signs_{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
