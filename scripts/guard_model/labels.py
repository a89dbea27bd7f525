"""What the sources' own classes mean here: the guard's categories, and rows that should be answered after all."""

from __future__ import annotations

from guards.categories import Category

_ADVICE = (
    "catqa:Tailored Financial Advice/",
    "catqa:Political Campaigning/Election advertising",
    "catqa:Political Campaigning/Lobbying",
    "catqa:Political Campaigning/Political activism",
    "catqa:Political Campaigning/Partisan commentary",
    "catqa:Adult Content/Adult-themed humor",
    "spc_",  # advice of specialists: elections, finance, health, law
)

# By source, the beginning of a class (or of one of several, parted by "; " or "+") and what it means.
_MEANINGS: dict[str, dict[str, tuple[Category, ...]]] = {
    "do_not_answer": {
        "S001": ("deception",),
        "S003": ("crime",),
        "S004": ("sexual",),
        "S005hate": ("hate",),
        "S005": ("harassment",),
        "S006sh": ("self_harm",),
        "S006threat": ("violence", "harassment"),
        "S006": ("violence", "weapons"),
        "S007": ("hate",),
        "S008spam": ("deception",),
        "S008": ("cyber",),
        "S009": ("privacy",),
    },
    "red_instruct": {
        "catqa:Illegal Activity/Weapon": ("weapons", "crime"),
        "catqa:Illegal Activity/Cybercrime": ("cyber", "crime"),
        "catqa:Illegal Activity": ("crime",),
        "catqa:Child Abuse/Content": ("minors", "sexual"),
        "catqa:Child Abuse/Online": ("minors", "sexual"),
        "catqa:Child Abuse": ("violence",),
        "catqa:Hate/Harass/Violence/Racial": ("hate",),
        "catqa:Hate/Harass/Violence/Religious": ("hate",),
        "catqa:Hate/Harass/Violence/Gender": ("violence", "hate"),
        "catqa:Hate/Harass/Violence/Cyberbullying": ("harassment",),
        "catqa:Hate/Harass/Violence/Terrorism": ("violence",),
        "catqa:Malware": ("cyber",),
        "catqa:Physical Harm/Self-harm": ("self_harm",),
        "catqa:Physical Harm/Assault": ("violence",),
        "catqa:Physical Harm/Weapon": ("weapons", "violence"),
        "catqa:Economic Harm": ("crime",),
        "catqa:Fraud/Deception/Phishing": ("cyber", "crime"),
        "catqa:Fraud/Deception": ("crime", "deception"),
        "catqa:Adult Content": ("sexual",),
        "catqa:Political Campaigning/Political misinformation": ("deception",),
        "catqa:Privacy": ("privacy",),
    },
    "aart": {
        "hate crimes": ("hate", "violence"),
        "crimes motivated": ("hate", "violence"),
        "terrorism": ("violence",),
        "violence": ("violence",),
        "acts of violence": ("violence",),
        "murder": ("violence",),
        "assa": ("violence",),
        "bombings": ("violence", "weapons"),
        "kidnapping": ("violence", "crime"),
        "hijackings": ("violence", "crime"),
        "domestic violence": ("violence",),
        "rape": ("sexual", "violence"),
        "animal": ("violence",),
        "dog fighting": ("violence",),
        "cockfighting": ("violence",),
        "pornography": ("sexual",),
        "prostitution": ("sexual", "crime"),
        "sex trafficking": ("sexual", "crime"),
        "child trafficking": ("minors", "crime"),
        "cyberterrorism": ("cyber", "violence"),
        "": ("crime",),
    },
    "ailuminate_demo": {
        "cse": ("minors", "sexual"),
        "dfm": ("harassment", "deception"),
        "hte": ("hate",),
        "ipv": ("crime",),
        "iwp": ("weapons", "violence"),
        "ncr": ("crime",),
        "prv": ("privacy",),
        "src": ("sexual", "violence"),
        "ssh": ("self_harm",),
        "sxc": ("sexual",),
        "vcr": ("violence",),
    },
    "multijail": {
        "Adult content": ("sexual",),
        "Animal abuse": ("violence",),
        "Bullying": ("harassment",),
        "Conspiracy": ("deception",),
        "Discrimination": ("hate",),
        "Fraud": ("crime", "deception"),
        "Hate": ("hate",),
        "Non-violent": ("deception",),
        "Property": ("crime",),
        "Self-harm": ("self_harm",),
        "Sexual exploitation": ("sexual", "crime"),
        "Soliciting": ("privacy",),
        "Substance": ("crime",),
        "Terrorism": ("violence", "crime"),
        "Theft": ("crime",),
        "Violence": ("violence",),
        "Weapons": ("weapons",),
    },
}


def is_advice(source_class: str | None) -> bool:
    """Whether a row that its source calls unsafe asks for advice, campaign texts or jokes that may well be given."""
    return source_class is not None and source_class.startswith(_ADVICE)


def categories(source: str, source_class: str | None) -> frozenset[Category]:
    """The guard's categories of an unsafe row; empty: not known."""
    meanings = _MEANINGS.get(source)
    if meanings is None or source_class is None or is_advice(source_class):
        return frozenset()
    code = source == "do_not_answer"
    pieces = source_class.rpartition(":")[2].split("+") if code else source_class.split("; ")
    found: set[Category] = set()
    for piece in pieces:
        # The longest beginning that fits says most.
        fits = [begin for begin in meanings if piece.startswith(begin)]
        if fits:
            found.update(meanings[max(fits, key=len)])
    return frozenset(found)
