"""Find out which columns of a table of notes or codes hold what: by the user's mapping, or by known names."""

import difflib
import fnmatch
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from model.errors import UserError
from utils.icd10.people import PERSON_FIELDS
from utils.icd10.roles import UNIT_DP, check_roles

# Known names of each field as `_key` writes them, the preferred first: this project's, OMOP and EDS, i2b2, and those of
# French exports (NDA, NAS, IEP, RSS: identifiers of a stay; IPP, NIP: of a patient; RUM, UM, UF: units).
_KNOWN = {
    "stay": "visitoccurenceid visitoccurrenceid stayid stay sejourid idsejour sejour nosejour nsejour numsejour "
    "numerosejour nda "
    "numnda nas iep numiep rss norss nrss numrss numerorss encounternum encounterid hadmid venue numvenue "
    "novenue nvenue "
    "dossier numdossier nodossier ndossier numerodossier numadm numeroadministratif",
    "text": "text notetext texte note content contenu compterendu texteducompterendu crtexte textecr notecontent "
    "observationblob document cr txt corps",
    "patient": "patientid patient idpatient ipp personid numpatient numeropatient patientnum nip noip subjectid "
    "subject",
    "date": "notedatetime notedate date datedocument datedoc documentdate datecr datenote datecompterendu dateducr "
    "startdate datecreation",
    "kind": "noteclasssourcevalue noteclass kind typedocument typedoc doctype documenttype typecr "
    "naturedocument nature "
    "notetype typenote notetitle titre libelledocument",
    "discharge": "datesortie dtsortie datsortie datesor datsor dischargedate discharge visitenddatetime visitenddate "
    "datefinsejour finsejour datefin sortie dischtime",
    "sex": "sex sexe genre gender gendersourcevalue genderconceptid sexepatient patientsex codesexe sexcd",
    "age": "age ageannees ageans agepatient ageadmission agealadmission ageentree agealentree ageinyears",
    "birth": "birthdatetime birthdate dateofbirth birth dob datenaissance datedenaissance dtnaissance datenais ddn",
    "code": "conceptcode conditionsourcevalue code codecim codecim10 cim10 cim icd10 icd10code icdcode diag codediag "
    "codediagnostic diagnostic diagcode conceptcd",
    "role": "conditionstatussourcevalue role statut status typediag typediagnostic diagtype diagnosistype type "
    "statutdiag position tvalchar",
    "unit": "rum norum nrum numrum numerorum rumid idrum unit unite um num unitemedicale uf "
    "visitdetailid numum noum ordrerum",
    "main": "main dpdusejour dpsejour dprss rumdp rumprincipal umprincipale rumdudp estdpsejour principal estprincipal",
    "dp": "dprss dp dgnpal diagnosticprincipal diagprincipal diagp codedp dpcode",
    "dpum": "dpum dprum dpunite dp",  # DP next to DP_RSS is the unit's
    "dr": "dr dgnrel diagnosticrelie diagrelie diagr coderd drcode codedr",
    "das": "das da diagnosticassocie diagnosticsassocies diagassocie diagassocies dgnas codedas diagass diagassoc "
    "diagnosticsassociessignificatifs diagnosticassociesignificatif listedas",
}
_NAMES = {field: [name.casefold() for name in names.split()] for field, names in _KNOWN.items()}
WIDE = {"dp": "DP", "dpum": UNIT_DP, "dr": "DR", "das": "DAS"}  # columns of codes by role

NOTE_FIELDS = ("stay", "text", "patient", "date", "kind", "discharge", *PERSON_FIELDS)
_LONG_FIELDS = ("stay", "code", "role", "unit", "main", "patient", "discharge", *PERSON_FIELDS)
_FIELDS = tuple(dict.fromkeys((*NOTE_FIELDS, *_LONG_FIELDS, *WIDE)))
_TABLES = ("notes", "codes")


def _key(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return re.sub(r"[\W_]", "", "".join(char for char in decomposed if not unicodedata.combining(char)))


class TableMapping(NamedTuple):
    """What the user says about the tables: columns by field, of both tables or of one of them, and roles by status."""

    both: dict[str, str]
    notes: dict[str, str]
    codes: dict[str, str]
    roles: dict[str, str]

    def of(self, table: str) -> dict[str, str]:
        """Return the columns of "notes" or "codes" by field, those of both tables included."""
        return self.both | getattr(self, table)


class Columns(NamedTuple):
    """The columns of a table by field; only those of `das` can be several."""

    table: str  # "notes" or "codes"
    names: dict[str, list[str]]

    def get(self, row: Mapping[str, Any], field: str) -> Any:
        """Return the value of a row in a field, None if the table or the row does not have it."""
        names = self.names.get(field)
        return row.get(names[0]) if names else None

    def has_given(self, field: str, pattern: str) -> bool:
        """Return whether the columns of a field are those that the user gave."""
        return bool(matching_columns(pattern, self.names.get(field, [])))

    @property
    def is_wide(self) -> bool:
        """Whether a row has the codes of several roles."""
        return any(field in self.names for field in WIDE)

    def describe(self, path: Path) -> str:
        """Return a line that says what was recognized."""
        rows = "notes" if self.table == "notes" else "a row per stay or unit" if self.is_wide else "a row per code"
        found = "; ".join(f"{WIDE.get(field, field)}: {', '.join(names)}" for field, names in self.names.items())
        return f"{path} ({rows}) {found}"


def read_mapping(option: str | None) -> TableMapping:
    """Parse `--columns`: `stay=NDA,text=CR,codes.stay=RSS,das=DAS*`, or a YAML file of the same and of `roles`.

    Raises:
        UserError: the file cannot be read, or has an unknown field.
    """
    if option and option.endswith((".yaml", ".yml")):
        given = _read_yaml(Path(option))
    else:
        entries = (entry.partition("=") for entry in (option or "").split(",") if entry.strip())
        given = {field.strip(): column for field, _, column in entries}
    sections: dict[str, dict[str, str]] = {"both": {}, "notes": {}, "codes": {}, "roles": {}}
    for name, column in given.items():
        section, _, field = str(name).strip().rpartition(".")
        if section != "roles" and (field not in _FIELDS or section not in ("", *_TABLES) or not str(column).strip()):
            near = difflib.get_close_matches(field, _FIELDS, 1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != field else "."
            raise UserError(
                f"--columns: found {name!s:.40}={column!s:.40}, expected FIELD=COLUMN with one of "
                f"{', '.join(_FIELDS)}{hint}"
            )
        sections[section or "both"][field] = str(column).strip()
    sections["roles"] = check_roles(sections["roles"], f"{option}: roles")
    return TableMapping(**sections)


def _read_yaml(path: Path) -> dict[str, str]:
    """Return the entries of a mapping file, those of a block with its name before them: `codes.stay`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--columns {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise UserError(f"--columns {path} is not a valid YAML file: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(content, dict):
        raise UserError(f"--columns {path}: expected lines such as `stay: NDA`.")
    flat: dict[str, str] = {}
    for name, value in content.items():
        block = value if isinstance(value, dict) else {"": value}
        for field, column in block.items():
            joined = "+".join(map(str, column)) if isinstance(column, list) else str(column)
            flat[f"{name}.{field}" if isinstance(value, dict) else str(name)] = joined
    return flat


def find_columns(
    path: Path, table: str, header: Sequence[str], mapping: TableMapping, rows_are_stays: bool = False
) -> Columns:
    """Return the columns of a table.

    Args:
        path: of the table, for messages.
        table: "notes" or "codes".
        header: its columns.
        mapping: columns that the user gave.
        rows_are_stays: whether each row is a stay where no column names it, but for `id`.

    Raises:
        UserError: a column that the user gave or that is needed is missing.
    """
    allowed = NOTE_FIELDS if table == "notes" else (*_LONG_FIELDS, *WIDE)
    names: dict[str, list[str]] = {}
    for field, pattern in mapping.of(table).items():
        if field in allowed:
            found = matching_columns(pattern, header)
            if not found and field in getattr(mapping, table):
                raise _missing(path, header, [field], pattern)
            names |= {field: found} if found else {}
    given = {column for found in names.values() for column in found}
    free = [column for column in header if column not in given]
    for field in allowed:
        if field not in names and (found := _known(field, free)):
            names[field] = found
    if table == "codes":
        _settle_layout(names, mapping.of("codes"))
    if rows_are_stays and "stay" not in names:
        names |= {"stay": found[:1]} if (found := [column for column in header if column.casefold() == "id"]) else {}
    needed = ["stay", "text"][rows_are_stays:] if table == "notes" else ["stay"]
    if table == "codes" and not any(field in names for field in WIDE):
        needed += ["code", "role"]
    if missing := [field for field in needed if field not in names]:
        raise _missing(path, header, missing, None)
    return Columns(table, {field: names[field] for field in (*allowed,) if field in names})


def _settle_layout(names: dict[str, list[str]], given: Mapping[str, str]) -> None:
    """Keep the columns of one layout: a code and its role per row, or columns of roles."""
    if names.get("dpum") == names.get("dp"):
        names.pop("dpum", None)
    # A row per code has at most the stay's DP as a column, never its DR or DAS.
    wide = any(field in given for field in WIDE) or not ("code" in names and "role" in names)
    wide = (wide and any(field in names for field in WIDE)) or ("dp" in names and ("das" in names or "dr" in names))
    for field in ("code", "role") if wide else WIDE:
        names.pop(field, None)
    if wide and "main" in names and names["main"] == names.get("dp"):
        del names["main"]


def matching_columns(pattern: str, header: Sequence[str]) -> list[str]:
    """Return the columns that `DAS1+DAS2` or `DAS*` names; case and accents count only where names differ in them."""
    found = []
    for part in pattern.split("+") if pattern not in header else [pattern]:
        part = part.strip()
        exact = [column for column in header if column == part]
        loose = [column for column in header if fnmatch.fnmatchcase(column.casefold(), part.casefold())]
        found += exact or loose
    return list(dict.fromkeys(found))


def _known(field: str, columns: Sequence[str]) -> list[str]:
    by_key = {_key(column): column for column in reversed(columns)}
    if field == "das":
        names = "|".join(_NAMES["das"])
        return [column for column in columns if re.fullmatch(rf"(?:{names})\d*", _key(column))]
    numbered = f"{field}1" if field in ("dp", "dr") else None
    return next(([by_key[name]] for name in (*_NAMES[field], numbered) if name in by_key), [])


def _missing(path: Path, header: Sequence[str], fields: Sequence[str], pattern: str | None) -> UserError:
    """Return the error for columns that are not there, with the nearest names."""
    near: list[str] = []
    for field in fields:
        wanted = [_key(pattern)] if pattern else _NAMES[field]
        close = {
            column: max(difflib.SequenceMatcher(None, _key(column), name).ratio() for name in wanted)
            for column in header
        }
        near += [column for column in header if close[column] > 0.75 and close[column] == max(close.values())][:1]
    what = f"{pattern!r} for {fields[0]}" if pattern else " and no column for ".join(fields)
    hint = f" Is it {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    example = ",".join(f"{field}={'COLUMN'}" for field in fields)
    wide = " (or dp=COLUMN,dr=COLUMN,das=COLUMN* for columns of roles)" if "code" in fields or "role" in fields else ""
    if "text" in fields and len(header) == 1 and path.suffix == ".txt":  # its first line may be a note's: not quoted
        return UserError(
            f"{path}: no column for text; expected a table with a header. For a file that is one note: "
            "python -m utils.chat RUN --icd10 --prompt - < NOTE.txt"
        )
    # Without a header, the first row would be quoted: names that are too long may be a note's text.
    shown = ", ".join(repr(column) if len(column) <= 40 else "a longer text" for column in header[:30]) or "nothing"
    return UserError(
        f"{path}: no column {'' if pattern else 'for '}{what}; found {shown}.{hint} "
        f"Name it with --columns {example}{wide}."
    )
