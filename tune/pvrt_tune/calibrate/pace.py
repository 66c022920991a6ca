"""What blocks leave out so that all are calibrated in time."""

import time
from dataclasses import dataclass, replace

from pvrt_tune.settings import EFFORTS, Recipe

#: Batches of hidden states that blocks have at least: with fewer, fits take most of the time, and
#: what they are fitted on says too little.
LEAST = 16
# How much of the text is left out at once, at most: one slow block says little.
_CUT = 0.25


@dataclass
class Pace:
    """How the next block is calibrated, so that all are through by `until` (time.monotonic).

    batches: of hidden states in use. brief: fits and block tuning are no longer than those of
    effort quick.
    """

    until: float | None
    batches: int
    brief: bool = False

    def after(self, seconds: float, left: int) -> bool:
        """After a block that took so long and with `left` blocks to come: whether it changed."""
        if self.until is None or left == 0:
            return False
        allowed = (self.until - time.monotonic()) / left
        before = self.brief, self.batches
        if seconds > allowed and not self.brief:
            self.brief = True
        elif seconds > allowed:
            share = max(_CUT, allowed / seconds)
            self.batches = min(self.batches, max(LEAST, int(share * self.batches)))
        return before != (self.brief, self.batches)

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe as short as the time asks for."""
        if not self.brief:
            return recipe
        quick, own = EFFORTS["quick"].fit, recipe.fit
        fit = replace(
            own,
            rounds=min(own.rounds, quick.rounds),
            kmeans_iterations=min(own.kmeans_iterations, quick.kmeans_iterations),
        )
        finetune = replace(recipe.finetune, epochs=min(recipe.finetune.epochs, 1))
        return replace(recipe, fit=fit, finetune=finetune)
