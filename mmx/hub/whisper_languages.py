"""Names of languages: Whisper's codes and their English names."""

from __future__ import annotations

from collections.abc import Collection


def find_language(given: str, known: Collection[str]) -> str | None:
    """Return the one of the known language codes that is given as code, token or English name; None if there is none.

    Example:
        >>> find_language("German", ["en", "de"])
        'de'
    """
    name = given.strip().lower().removeprefix("<|").removesuffix("|>")
    if name in known:
        return name
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = TO_LANGUAGE_CODE.get(name)
    return code if code in known else None


def language_names(known: Collection[str]) -> list[str]:
    """Return the known language codes and their English names."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return [*known, *(LANGUAGES[code] for code in known if code in LANGUAGES)]
