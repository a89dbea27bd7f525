"""The /metrics page of a running server, as the commands that show figures read it."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from edgellm.errors import ConfigError

_TIMEOUT_S = 10.0


def read_metrics(url: str, api_key: str | None) -> list[Sample]:
    """The samples of a model's figures, without the prefix edgellm_ and the suffix _total.

    Raises ConfigError if no server of ours answers at `url`.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", headers=headers, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no server answers at {url}: {error}") from None
    if answer.status_code != httpx.codes.OK:
        raise ConfigError(f"{url}/metrics answers with status {answer.status_code}")
    return [
        sample._replace(name=sample.name.removeprefix("edgellm_").removesuffix("_total"))
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name.startswith("edgellm_") and "model" in sample.labels
    ]
