"""What is wrong with an unsafe text: the classifier's categories. A text may be of several."""

from __future__ import annotations

from typing import Literal, get_args

Category = Literal[
    "hate",  # slurs, discrimination, dehumanising stereotypes of a group
    "harassment",  # bullying, insults and threats against a person
    "violence",  # hurting people or animals, incitement, terrorism
    "weapons",  # building or getting what kills: firearms, explosives, chemical, biological, nuclear
    "self_harm",
    "sexual",
    "minors",  # sexual exploitation of children
    "crime",  # theft, fraud, drugs, trafficking, damage to property or nature
    "cyber",  # malware, breaking into systems, phishing
    "privacy",  # personal data of others, doxing, surveillance
    "deception",  # misinformation, propaganda, lies told to harm
]

CATEGORIES: tuple[Category, ...] = get_args(Category)
