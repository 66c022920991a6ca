"""Cards to plan for that are not here: their memory, and rates that their data sheets say.

Rates of dense products, with sums in float32. Where a vendor gives only those with sparsity, half
of them. Nothing here was measured.
"""

from dataclasses import dataclass

from pvrt.errors import RunError
from pvrt_tune.plan.speed import Speed


@dataclass(frozen=True)
class Card:
    """A card by its name: memory in GB; products in float32 and in bfloat16 in TFLOP/s; memory and
    bus (one direction) in GB/s.
    """

    name: str
    memory: float
    single: float
    half: float
    bandwidth: float
    bus: float

    def speed(self, why: str = "") -> Speed:
        """Half of each: what kernels of large products and copies reach, give or take.

        why: whence it is known that it is this card. Search writes and reads scores: 16 operations
        per 8 bytes.
        """
        memory = self.bandwidth / 2 * 1e9
        return Speed(
            products=self.single / 2 * 1e12,
            half=self.half / 2 * 1e12,
            search=2 * memory,
            memory=memory,
            bus=self.bus / 2 * 1e9,
            basis=f"half of the data sheet of {self.name}{why}, not measured",
        )


#: What is planned for where nobody says anything of the GPU.
A100 = Card("A100 80GB", 80, 19.5, 312, 2039, 31.5)
#: Of one memory the slowest first.
CARDS = (
    Card("RTX 4060", 8, 15.1, 30.2, 272, 15.8),
    Card("RTX 3060", 12, 12.7, 25.5, 360, 31.5),
    Card("RTX 4070", 12, 29.1, 58.3, 504, 31.5),
    Card("RTX 4060 Ti 16GB", 16, 22.1, 44.1, 288, 15.8),
    Card("RTX 4080", 16, 48.7, 97.5, 717, 31.5),
    Card("RTX 5080", 16, 56.3, 112.6, 960, 63),
    Card("RTX 3090", 24, 35.6, 71.2, 936, 31.5),
    Card("RTX 4090", 24, 82.6, 165.2, 1008, 31.5),
    Card("RTX 5090", 32, 104.8, 209.5, 1792, 63),
    Card("RTX A6000", 48, 38.7, 154.8, 768, 31.5),
    Card("L40S", 48, 91.6, 362, 864, 31.5),
    A100,
    Card("H100", 80, 67, 989, 3350, 63),
    Card("H200", 141, 67, 989, 4800, 63),
)


def named(name: str) -> Card:
    """The card that a user means: spaces, hyphens and cases do not matter.

    Raises RunError with the names that there are.
    """

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    for card in CARDS:
        if plain(card.name) == plain(name):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise RunError(f"--card {name} is not in the table; it has {known}")


def assumed(memory: float) -> Card:
    """The slowest of the smallest cards with so many GB, or the largest card."""
    enough = [card for card in CARDS if card.memory >= memory]
    return min(enough, key=lambda card: card.memory) if enough else CARDS[-1]
