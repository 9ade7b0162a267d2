"""Sentence templates of fictional French notes. `NoteWriter.fill` replaces the braces.

A diagnosis is named by {nu} (HTA), {un} (une HTA), {d_un} (d'une HTA) or {de} (d'HTA). A diagnosis that must not be
coded always has a cue in the same sentence or list item: a negation, the end of the episode, a relative.
"""

from typing import NamedTuple

# --- The stay ---------------------------------------------------------------------------------------------------------

TITLES = (
    "Compte rendu d'hospitalisation",
    "COMPTE RENDU D'HOSPITALISATION",
    "Compte-rendu de séjour",
    "Lettre de liaison",
)
PLACES = (
    "Centre hospitalier intercommunal",
    "Centre hospitalier universitaire",
    "Hôpital général",
    "Clinique mutualiste",
)
FIRST_NAMES = {
    "M": ("André", "Bernard", "Christophe", "Daniel", "Gérard", "Hugo", "Karim", "Louis", "Michel", "Thierry"),
    "F": ("Annie", "Chantal", "Denise", "Fatima", "Hélène", "Jeanne", "Léa", "Monique", "Sylvie", "Yvette"),
}
IDENTITIES = (
    "{civilité} {prénom} {initiale}., {age} ans",
    "Patient{e} : {prénom} {initiale}. ({age} ans, sexe {masculin})",
    "Concerne : {civilité} {initiale}., {né} en {naissance}, {age} ans",
)
DATES = (
    "Séjour du {entrée} au {sortie}",
    "Entrée le {entrée}, sortie le {sortie}",
    "Hospitalisation du {entrée} au {sortie} ({durée})",
)
LETTER_OPENINGS = (
    "Cher confrère, chère consœur,",
    "Votre patient{e}, {civilité} {initiale}., a séjourné dans notre service.",
    "Nous vous adressons le compte rendu concernant {civilité} {initiale}.",
)
ADMISSIONS = {
    True: ("Hospitalisation programmée.", "Entrée programmée, en provenance du domicile."),
    False: (
        "Entrée par les urgences.",
        "Mode d'entrée : urgences.",
        "Transfert depuis l'unité d'accueil des urgences.",
    ),
}
HEADINGS = {
    "motif": ("Motif d'hospitalisation", "Motif d'admission", "Motif d'entrée"),
    "antécédents": ("Antécédents", "Antécédents et terrain", "Antécédents médicaux et chirurgicaux"),
    "entrée": ("Traitement à l'entrée", "Traitement habituel", "Traitement en cours à l'admission"),
    "vie": ("Mode de vie", "Contexte de vie"),
    "histoire": ("Histoire de la maladie", "Anamnèse", "Histoire récente"),
    "examen": ("Examen clinique", "Examen à l'entrée", "Examen clinique d'entrée"),
    "examens": ("Examens complémentaires", "Résultats des examens complémentaires", "Bilan paraclinique"),
    "évolution": ("Évolution dans le service", "Prise en charge et évolution", "Évolution"),
    "conclusion": ("Conclusion", "Au total", "Synthèse"),
    "sortie": ("Traitement de sortie", "Ordonnance de sortie"),
    "suivi": ("Suivi", "Devenir et suivi", "Consignes de sortie"),
}
HEADING_STYLES = ("{titre} :\n{texte}", "{TITRE}\n{texte}", "**{titre} :**\n{texte}", "{titre} : {texte}")

# --- Coded diagnoses --------------------------------------------------------------------------------------------------

# For the main diagnosis, or for the complaint that is mentioned instead of it.
ADMISSION_REASONS = (
    "Prise en charge {d_un}.",
    "{Nu}.",
    "Hospitalisation pour {un}.",
    "{Pt} est hospitalisé{e} pour {un}.",
    "{Pt} est adressé{e} par son médecin traitant pour {un}.",
    "{Civilité} {initiale}. nous est adressé{e} devant {un}.",
)
SHORT_ADMISSION_REASONS = (
    "{Homme} de {age} ans, hospitalisé{e} pour {un}.",
    "{Homme} de {age} ans. Motif : {nu}.",
    "{Un_pt} de {age} ans est admis{e} pour {un}.",
    "Hospitalisation {d_un_pt} de {age} ans pour {un}.",
    "{Pt}, {age} ans, entre pour {un}.",
    "Motif d'entrée : {nu}. {Homme} de {age} ans.",
)
CONCLUSIONS = (
    "Au total, le tableau est celui {d_un}.",
    "Le diagnostic {de} est retenu.",
    "Ces éléments sont en faveur {d_un}.",
    "Le bilan conclut à {un}.",
    "On retient {un}.",
    "L'ensemble fait porter le diagnostic {de}.",
)
RELATED = (
    "Traitement en cours pour {un}.",
    "{Pt} est suivi{e} pour {un}.",
    "La prise en charge s'inscrit dans le cadre {d_un}.",
    "Pathologie causale : {nu}.",
)
CLOSING_CONCLUSIONS = (
    "Séjour motivé par {un}.",
    "{Nu} chez {un_pt} de {age} ans.",
    "En résumé, {un} chez {un_pt} de {age} ans.",
    "Prise en charge {d_un}, sans autre particularité à la sortie.",
)
MEDICAL_HISTORY = (
    "ATCD : {liste}.",
    "Antécédents : {liste}.",
    "Terrain : {liste}.",
    "On note dans les antécédents : {liste}.",
)
COMORBIDITIES = (
    "{Pt} est par ailleurs suivi{e} pour {un}{suite}.",
    "À noter {un}{suite}.",
    "Par ailleurs, {nu}{suite}.",
    "Terrain marqué par {un}{suite}.",
)
IN_BLOOD_TEST = (
    "Le bilan biologique retrouve {un}{suite}.",
    "Sur le plan biologique, {nu}{suite}.",
    "On note {un} à l'entrée{suite}.",
    "Le bilan met en évidence {un}{suite}.",
)
ON_IMAGING = (
    "L'imagerie met en évidence {un}{suite}.",
    "Le scanner retrouve {un}{suite}.",
    "Les images montrent {un}{suite}.",
)
DURING_STAY = (
    "Le séjour a été marqué par {un}{suite}.",
    "À J{jour}, survenue {d_un}{suite}.",
    "L'évolution se complique {d_un}{suite}.",
    "On constate {un}{suite}.",
    "Prise en charge également {d_un}{suite}.",
)

# --- Diagnoses that are not coded -------------------------------------------------------------------------------------

ABSENT = (
    "Pas d'argument pour {un}.",
    "Absence {de}.",
    "Pas {de} au bilan.",
    "Aucun élément en faveur {d_un}.",
    "L'hypothèse {d_un} n'est pas retenue.",
    "L'hypothèse initiale {d_un} est écartée par les examens.",
    "Les examens ne retrouvent pas {de}.",
)
NEVER_HAD = ("pas {de}", "pas {de} à l'interrogatoire", "absence {de}")
PAST = (
    "{nu} en {année} sans séquelle",
    "{nu} il y a {ancienneté} ans sans récidive",
    "ancien épisode {de} (guéri en {année})",
    "épisode résolu {de} en {année}",
)
FAMILY = ("{nu} chez {son_parent}", "{parent} : {nu}", "{parent} suivi{e_parent} pour {un}")
RELATIVES = {"M": ("père", "frère", "oncle", "grand-père"), "F": ("mère", "sœur", "tante", "grand-mère")}


class Surgery(NamedTuple):
    """A past operation, for patients of this sex without a coded disease of these groups."""

    text: str
    sex: str = "FM"
    groups: tuple[str, ...] = ()


SURGERIES = (
    Surgery("appendicectomie dans l'enfance", groups=("K35",)),
    Surgery("cholécystectomie en {année}", groups=("K80", "K85")),
    Surgery("amygdalectomie dans l'enfance"),
    Surgery("césarienne en {année}", sex="F"),
    Surgery("hystérectomie en {année}", sex="F"),
    Surgery("vasectomie en {année}", sex="M"),
    Surgery("arthroscopie du genou en {année}", groups=("M17",)),
    Surgery("chirurgie du canal carpien en {année}", groups=("S52",)),
)
ALLERGIES = ("aucune allergie médicamenteuse connue", "pas d'allergie connue")

# --- Living situation, examination, laboratory ------------------------------------------------------------------------

LIVING_SITUATIONS = {
    "active": (
        "Travaille comme {employé{e} de bureau|enseignant{e}|agent d'entretien|aide-soignant{e}}, deux enfants.",
        "En couple, exerce une activité de {commerce|conduite|secrétariat}.",
    ),
    "retired": (
        "Retraité{e}, vit avec {conjoint} dans {une maison de plain-pied|un appartement avec ascenseur}.",
        "Vit en résidence services, enfants à proximité.",
        "Retraité{e}, passage d'une infirmière {une|deux} fois par jour.",
    ),
}
VITAL_SIGNS = (
    "TA {TAS}/{TAD} mmHg, FC {FC}/min, température {T} °C, SpO2 {SpO2} % en air ambiant.",
    "Constantes : PA {TAS}/{TAD}, pouls {FC}/min, T° {T} °C, saturation {SpO2} % en AA, FR {FR}/min.",
    "À l'entrée : température {T} °C, tension {TAS}/{TAD} mmHg, FC {FC}/min, SpO2 {SpO2} %, IMC {IMC} kg/m².",
)
NORMAL_EXAMINATION = {
    "cardio": ("Bruits du cœur réguliers, sans souffle.", "Auscultation cardiaque sans particularité."),
    "resp": ("Murmure vésiculaire symétrique, sans bruit surajouté.", "Auscultation pulmonaire claire."),
    "abdo": ("Abdomen souple, dépressible et indolore.", "Palpation abdominale sans particularité."),
    "neuro": ("Examen neurologique sans anomalie.", "{Pt} est orienté{e}, sans déficit focalisé."),
    "membres": ("Mollets souples, pouls périphériques perçus.", "Pas d'œdème des membres inférieurs."),
    "peau": ("Téguments sans lésion.", "Revêtement cutané intact."),
}


class Measure(NamedTuple):
    """A measurement: names in a blood test (empty for physical signs), unit, normal range, decimals."""

    names: tuple[str, ...]
    unit: str
    low: float
    high: float
    decimals: int = 0
    vital: bool = False
    usual: bool = True  # part of a routine blood test


MEASURES = {
    "TAS": Measure((), "mmHg", 108, 142, vital=True),
    "TAD": Measure((), "mmHg", 58, 82, vital=True),
    "FC": Measure((), "/min", 62, 94, vital=True),
    "FR": Measure((), "/min", 13, 18, vital=True),
    "T": Measure((), "°C", 36.3, 37.4, 1, vital=True),
    "SpO2": Measure((), "%", 95, 99, vital=True),
    "IMC": Measure((), "kg/m²", 21.0, 26.5, 1),
    "Na": Measure(("natrémie", "Na+", "sodium"), "mmol/L", 136, 144),
    "K": Measure(("kaliémie", "K+", "potassium"), "mmol/L", 3.6, 4.8, 1),
    "creat": Measure(("créatinine", "créatininémie"), "µmol/L", 56, 98),
    "Hb": Measure(("hémoglobine", "Hb"), "g/dL", 12.6, 15.4, 1),
    "GB": Measure(("leucocytes", "GB"), "G/L", 4.6, 9.2, 1),
    "PLQ": Measure(("plaquettes",), "G/L", 172, 364),
    "CRP": Measure(("CRP",), "mg/L", 1, 8),
    "glyc": Measure(("glycémie",), "mmol/L", 4.6, 5.9, 1),
    "alb": Measure(("albumine", "albuminémie"), "g/L", 36, 44, usual=False),
    "HbA1c": Measure(("HbA1c",), "%", 5.0, 5.6, 1, usual=False),
    "vitD": Measure(("25-OH vitamine D",), "nmol/L", 78, 110, usual=False),
}
LABORATORY = ("Biologie : {liste}.", "Bilan biologique d'entrée : {liste}.", "Sur le plan biologique : {liste}.")

# --- Discharge --------------------------------------------------------------------------------------------------------

DISCHARGES = {
    "same day": ("Sortie le jour même.", "Retour à domicile le jour même."),
    "home": ("Retour à domicile à J{sortie_j}.", "Sortie à domicile après {durée}.", "Sortie autorisée à J{sortie_j}."),
    "frail": (
        "Retour à domicile à J{sortie_j} avec aides.",
        "Transfert en SSR à J{sortie_j}.",
        "Retour en EHPAD à J{sortie_j}.",
    ),
}
FOLLOW_UPS = (
    "Consultation de contrôle dans {3-12} semaines.",
    "{Pt} reverra son médecin traitant dans {7-21} jours.",
    "Bilan biologique de contrôle à {2-4} semaines.",
    "Un courrier est adressé au médecin traitant.",
    "Réévaluation en consultation de service à {2-6} mois.",
)
FILLER_DRUGS = (
    "Paracétamol 1 g : 1 comprimé si douleur, maximum 3 par jour",
    "Traitement habituel inchangé par ailleurs",
)
SIGNATURES = (
    "Bien confraternellement.",
    "Confraternellement, le médecin du service.",
    "Compte rendu validé par le senior du service.",
)
