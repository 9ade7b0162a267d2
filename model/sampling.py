"""How generation chooses tokens. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Filters apply in this order, as in transformers; the default is greedy decoding.

    Attributes:
        temperature: divides the logits; 0 selects the most likely token.
        top_k: number of most likely tokens to choose from; 0 for all of them.
        top_p: choose from the fewest most likely tokens whose probabilities reach this sum (Holtzman et al., 2020).
        seed: of the random numbers of a sequence; a sequence that is one of several can have a seed of its own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()
