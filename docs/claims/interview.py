"""Claims of the interview questions: an outlook on what the engine does not do."""

from __future__ import annotations

from claims.ledger import Claim, Derived, Table

HERE = "docs/claims/interview.py"
ACCEPTED, DRAFTED = 0.8, 4

TABLES: dict[str, Table] = {}


def tokens_per_pass(accepted: float, drafted: int) -> float:
    """Tokens that a pass of the large model yields with `drafted` guesses, each right with probability `accepted`.

    1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a): the guesses up to the first wrong one, and one of the model's own
    (Leviathan et al. 2023, arXiv:2211.17192, equation 1).
    """
    return sum(accepted**guess for guess in range(drafted + 1))


CLAIMS: dict[str, Claim] = {
    "speculative-tokens": Derived(
        f"tokens per pass with {DRAFTED} guesses, each right with probability {ACCEPTED}",
        lambda: tokens_per_pass(ACCEPTED, DRAFTED),
        ".3g",
        tokens_per_pass,
    )
}
