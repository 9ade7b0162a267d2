"""What the statuses of diagnoses in hospitals' tables mean: DP, DR, DAS, and what is none of them."""

import re
import unicodedata
from collections.abc import Mapping

from model.errors import UserError
from model.wording import counted
from utils.icd10.codes import ROLES

UNIT_DP = "DP of a unit"  # the main diagnosis of one of a stay's units, not yet of the stay
DOCUMENTARY = "DAD"  # documentary associated diagnosis: not a diagnosis of the stay
IGNORED = "ignore"
TARGETS = (*ROLES, IGNORED)

# Names as `_key` writes them. DA is what the PMSI code system of AP-HP's FHIR guide calls a DAS.
_NAMES = {
    "DP": "dp p principal diagnosticprincipal diagprincipal dprss dpsejour dgnpal primary primarydiagnosis "
    "principaldiagnosis",
    UNIT_DP: "dpum dprum dpdurum dpunite",
    "DR": "dr r relie diagnosticrelie diagrelie dgnrel related relateddiagnosis",
    "DAS": "das da a s associe associes associesignificatif diagnosticassocie diagnosticsassocies diagassocie "
    "diagnosticassociesignificatif diagnosticsassociessignificatifs secondaire diagnosticsecondaire secondary "
    "secondarydiagnosis",
    DOCUMENTARY: "dad associedocumentaire diagnosticassociedocumentaire documentaire donneeavisedocumentaire",
}
_ROLE_OF_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}
_NUMBERS = {"1": "DP", "2": "DR", "3": "DAS"}
_LONGEST_STATUS = 40  # characters; more may be a note


def _key(status: str) -> str:
    """Return a status without case, accents, punctuation and number: `DAS 2`, `D.A.S.` and `das` are the same."""
    decomposed = unicodedata.normalize("NFKD", status.casefold())
    letters = re.sub(r"[\W_]", "", "".join(char for char in decomposed if not unicodedata.combining(char)))
    return re.sub(r"(?<=[a-z])\d+$", "", letters)


def parse_roles(text: str | None) -> dict[str, str]:
    """Parse the option `--roles DA=DAS,DAD=ignore`.

    Raises:
        UserError: an entry is not a status and one of DP, DR, DAS and ignore.
    """
    entries = [entry.partition("=") for entry in (text or "").split(",") if entry.strip()]
    return check_roles({status.strip(): role.strip() for status, _, role in entries}, "--roles")


def check_roles(roles: Mapping[str, str], where: str) -> dict[str, str]:
    """Return roles by status with the roles' spelling corrected.

    Raises:
        UserError: a role is not DP, DR, DAS or ignore.
    """
    spelling = {target.casefold(): target for target in TARGETS}
    for status, role in roles.items():
        if str(role).casefold() not in spelling:
            raise UserError(f"{where}: {status!r} is {role!r}; expected STATUS=ROLE with {', '.join(TARGETS)}.")
    return {str(status): spelling[str(role).casefold()] for status, role in roles.items()}


def read_statuses(counts: Mapping[str, int], given: Mapping[str, str], numbers_are_roles: bool) -> dict[str, str]:
    """Return the role of each status.

    Args:
        counts: number of codes of each status, as written.
        given: roles that the user gave, by status; the spelling of the status is as free as in the table.
        numbers_are_roles: whether 1, 2 and 3 can only mean DP, DR and DAS, not the rank of a code.

    Raises:
        UserError: a status is not known.
    """
    exact = {status.strip().casefold(): role for status, role in given.items()}
    by_key = {_key(status): role for status, role in given.items() if _key(status)}
    known = by_key | {key: role for key, role in _ROLE_OF_NAME.items() if key not in by_key}
    if numbers_are_roles:
        known = _NUMBERS | known
    found = {status: exact.get(status.strip().casefold()) or known.get(_key(status)) for status in counts}
    unknown = sorted((status for status, role in found.items() if role is None), key=lambda status: -counts[status])
    if longest := [status for status in unknown if len(status) > _LONGEST_STATUS]:
        raise UserError(
            f"A code's status has {len(longest[0])} characters; expected a short one such as DAS: name "
            "its column with --columns role=COLUMN."
        )
    if unknown:
        shown = ", ".join(f"{status or '(blank)'!r} ({counts[status]:,})" for status in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        example = ",".join(f"{status}=ROLE" for status in unknown[:2])
        codes = counted(sum(counts[status] for status in unknown), "code has", "codes have")
        raise UserError(
            f"{codes} a status whose role is not known: {shown}{more}. Give the role of each: --roles {example} with "
            "DP, DR, DAS, or ignore to leave its codes out."
        )
    return {status: role for status, role in found.items() if role is not None}
