"""Who is in the picture: shapes in points (1/128 of the picture) around the head's centre, colours as RGB in 0..1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]


def rgb(code: int) -> Colour:
    """0xRRGGBB as RGB in 0..1."""
    return ((code >> 16) / 255, (code >> 8 & 255) / 255, (code & 255) / 255)


# Backgrounds and clothes have one of these, so that a prompt can name it. All are far from each other and from the
# inside of a mouth.
COLOURS: dict[str, Colour] = {
    "red": rgb(0xD6453F), "orange": rgb(0xF0923A), "yellow": rgb(0xF4CF55), "green": rgb(0x58A65C),
    "teal": rgb(0x3BA5A0), "blue": rgb(0x4A7FD0), "purple": rgb(0x8A66C0), "pink": rgb(0xEE9DBB),
    "brown": rgb(0x8D6748), "grey": rgb(0xA3A9B0), "white": rgb(0xF1F1EC), "black": rgb(0x34373F),
}
SKINS = (0xFBDCC4, 0xF5C9A6, 0xEBB58B, 0xD89C70, 0xB97C52, 0x97603E, 0x754A31)
HAIRS = (0x2B2530, 0x43302A, 0x63432E, 0x8A5A34, 0xB98548, 0xE2BC6E, 0xC46A30, 0x9A9AA2, 0xD9D6D2, 0x4C5B8F)
HAIR_SHARES = (0.16, 0.14, 0.14, 0.13, 0.11, 0.11, 0.09, 0.04, 0.05, 0.03)
IRISES = (0x5B3A22, 0x7A5230, 0x3F7FB5, 0x4C9469, 0x6C7A86, 0x8A7B38)
LIPS = (0xC4625F, 0xD0706F, 0xB8504F, 0xC97F74)
HAIR_STYLES = ("bald", "short", "parted", "fringe", "curly", "bob", "long", "bun", "ponytail", "spiky")
COLLARS = ("crew", "vee", "shirt", "turtleneck", "hoodie")
BACKGROUNDS = ("plain", "gradient", "halo", "two-tone")
GLASSES = ("none", "round", "square")
BEARDS = ("none", "full", "goatee", "moustache")


@dataclass(frozen=True)
class Identity:
    """A cartoon portrait. Lengths are half widths and half heights in points; names are from the tuples above."""

    face_width: float
    face_height: float
    jaw: float  # exponent of the lower face: 1.9 pointed, 2.9 square
    skin: Colour
    hair_style: str
    hair: Colour
    eye_width: float
    eye_height: float
    eye_tilt: float  # radians, outer corner up
    eye_distance: float  # from the middle of the face
    iris: Colour
    brow_tilt: float
    brow_curve: float
    brow_thickness: float
    nose: float  # width
    ears: float
    mouth_width: float
    lip: Colour
    lip_thickness: float
    smile: float  # points by which the corners are higher
    blush: float
    freckles: bool
    glasses: str
    beard: str
    clothes: str  # a name in COLOURS
    collar: str
    background: str  # a name in COLOURS
    background_kind: str
    tints: tuple[Colour, Colour]  # what is added to the named colours of clothes and background

    @staticmethod
    def random(rng: np.random.Generator) -> Identity:
        """A portrait with every trait drawn at random; the clothes never have the background's colour."""

        def between(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        def near(code: int, spread: float) -> Colour:
            return shifted(rgb(code), float(rng.normal(0, spread)), rng.normal(0, spread / 3, 3))

        def tint() -> Colour:
            return shifted((0.0, 0.0, 0.0), between(-0.03, 0.03), rng.uniform(-0.015, 0.015, 3), low=-1.0)

        skin, style = near(int(rng.choice(SKINS)), 0.015), str(rng.choice(HAIR_STYLES))
        beard = str(rng.choice(BEARDS)) if style in ("bald", "short", "parted", "curly", "spiky") else "none"
        beard = beard if rng.random() < 0.6 else "none"
        clothes, background = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
        hair = near(int(rng.choice(HAIRS, p=HAIR_SHARES)), 0.015)
        return Identity(
            face_width=between(26.5, 30.5), face_height=between(31.5, 35.5), jaw=between(2.0, 2.8), skin=skin,
            hair_style=style, hair=hair, eye_width=between(5.0, 6.2), eye_height=between(4.3, 5.7),
            eye_tilt=between(-0.12, 0.16), eye_distance=between(11.0, 13.2), iris=near(int(rng.choice(IRISES)), 0.02),
            brow_tilt=between(-0.04, 0.13), brow_curve=between(0.6, 2.0), brow_thickness=between(0.8, 1.7),
            nose=between(2.2, 4.2), ears=between(4.2, 6.0), mouth_width=between(8.6, 11.0),
            lip=mix(skin, rgb(int(rng.choice(LIPS))), between(0.45, 0.9)), lip_thickness=between(1.0, 2.1),
            smile=between(1.6, 3.4), blush=between(0.0, 0.35), freckles=bool(rng.random() < 0.2),
            glasses=str(rng.choice(GLASSES, p=(0.7, 0.17, 0.13))), beard=beard, clothes=clothes,
            collar=str(rng.choice(COLLARS)), background=background,
            background_kind=str(rng.choice(BACKGROUNDS)), tints=(tint(), tint()),
        )

    @property
    def clothes_colour(self) -> Colour:
        return shifted(COLOURS[self.clothes], 0.0, self.tints[0])

    @property
    def background_colour(self) -> Colour:
        return shifted(COLOURS[self.background], 0.0, self.tints[1])


def shifted(colour: Colour, all_by: float, each_by: np.ndarray | Colour, low: float = 0.0) -> Colour:
    """The colour with something added to every channel, kept in low..1."""
    r, g, b = (min(1.0, max(low, float(c + all_by + d))) for c, d in zip(colour, each_by, strict=True))
    return (r, g, b)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """From a (share 0) to b (share 1)."""
    r, g, b_ = (x + (y - x) * share for x, y in zip(a, b, strict=True))
    return (r, g, b_)


def dark(colour: Colour, share: float = 0.25) -> Colour:
    """A deeper shade of the same hue, for outlines and shadows."""
    return (colour[0] * (1 - share), colour[1] * (1 - share * 1.08), colour[2] * (1 - share))


def light(colour: Colour, share: float = 0.2) -> Colour:
    return mix(colour, (1.0, 0.98, 0.94), share)
