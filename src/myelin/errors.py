"""Every error that Myelin raises on purpose, in one tree.

An error says what was found, and what to do. `exit_code` is what the command line returns:
0 ok, 1 failure, 2 usage, 3 evidence rejected, 4 receipt invalid, 5 budget exceeded,
6 image mismatch.
"""

from __future__ import annotations

from typing import ClassVar


class MyelinError(Exception):
    """The root of the tree: any failure that Myelin can name."""

    exit_code: ClassVar[int] = 1


class UsageError(MyelinError):
    """The caller asked for something that makes no sense, or that may not be done."""

    exit_code = 2


class PartyFileInvalid(UsageError):
    """A key file or public party file is missing, readable by others, or malformed."""


class PolicyInvalid(UsageError):
    """A policy file has an unknown key, a wrong type, or names nothing to compare with."""


class DataRefused(UsageError):
    """Records, labels or weights that cannot be sealed: shape, type, capacity, NaN."""


class PrivacyRefused(UsageError):
    """Privacy parameters outside their range, or a target that no noise can reach."""


class DocumentInvalid(MyelinError):
    """A document is not the bytes of docs/protocol.md.

    `reason` is one of the names listed there, `detail` says where and what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the reason, so that a caller can tell the cases apart."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SealedFileInvalid(DocumentInvalid):
    """A sealed file is truncated, reordered, altered, or opened with another key."""


class GrantRefused(MyelinError):
    """The client will not release a key; `check` names what did not hold."""

    def __init__(self, check: str, detail: str) -> None:
        """Keep the name of the check."""
        super().__init__(f"grant refused, {check}: {detail}")
        self.check = check
        self.detail = detail


class LedgerInvalid(MyelinError):
    """A privacy ledger is missing or malformed; nothing is granted against it."""


class BudgetExceeded(MyelinError):
    """Granting would spend more epsilon than the owner's ledger allows."""

    exit_code = 5

    def __init__(self, *, spent: float, asked: float, budget: float, delta: float) -> None:
        """Keep the numbers: `asked` is the total after the grant, not the job's own epsilon."""
        super().__init__(
            f"privacy budget exceeded: {spent:.4f} of {budget:.4f} epsilon is spent and this job "
            f"would bring it to {asked:.4f} (delta {delta:g}, add-or-remove-one); ask for a job "
            "with fewer steps or more noise, or raise the budget in a new ledger"
        )
        self.spent = spent
        self.asked = asked
        self.budget = budget
        self.delta = delta


class EvidenceRejected(MyelinError):
    """Evidence failed one appraisal check; nothing may be sent to that enclave."""

    exit_code = 3

    def __init__(
        self, check: str, *, found: object, expected: object = None, hint: str = ""
    ) -> None:
        """Keep the check, what was found and what the policy wants."""
        wanted = "" if expected is None else f", expected {expected}"
        super().__init__(
            f"evidence rejected, {check}: found {found}{wanted}{'; ' + hint if hint else ''}"
        )
        self.check = check
        self.found = found
        self.expected = expected
        self.hint = hint


class ReceiptInvalid(MyelinError):
    """A receipt does not prove what it says; `check` names what failed."""

    exit_code = 4

    def __init__(self, check: str, detail: str) -> None:
        """Keep the name of the check."""
        super().__init__(f"receipt invalid, {check}: {detail}")
        self.check = check
        self.detail = detail


class BuildFailed(MyelinError):
    """The compiler or the linker refused; the message holds what it said."""


class ImageInvalid(MyelinError):
    """A file is not an enclave image of docs/image.md."""


class ImageMismatch(MyelinError):
    """A rebuilt image is not the one that the job names."""

    exit_code = 6


class ExchangeError(MyelinError):
    """A file that somebody else should place in the exchange folder is missing."""


class EnclaveRefused(MyelinError):
    """The enclave answered with a refusal; `reason` is one of docs/protocol.md."""

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(f"the enclave refused: {reason} (docs/protocol.md lists the reasons)")
        self.reason = reason


class CellDied(MyelinError):
    """The cell ended while a request was under way: a fault, a system call, a signal."""


class ModelRefused(MyelinError):
    """A model, or the document of one, is malformed; the message says where and what fits."""


class UnsupportedLayer(MyelinError):
    """A model holds a layer that cannot be trained privately, or is not known."""

    def __init__(self, layer: str, why: str, advice: str) -> None:
        """Keep the layer's name, the reason, and what to do instead."""
        super().__init__(f"layer {layer} is refused: {why}; {advice}")
        self.layer = layer
        self.why = why
        self.advice = advice
