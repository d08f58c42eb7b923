"""Names, places and groups of people in free text, by Presidio on a spaCy model (``genrec[pii]``).

What a model finds depends on it: it misses names and takes titles for some. It comes beside the
patterns of `genrec.audit.pii`, not in their place.
"""

from __future__ import annotations

from pathlib import Path

from genrec.audit.pii import Finder

# Presidio's names; NRP: nationality, religion or political group. What patterns find is not asked.
ENTITIES = {"PERSON": "person", "LOCATION": "place", "NRP": "group"}


def presidio_finder(model: str, language: str = "en") -> Finder:
    """A finder for `genrec.audit.pii.mask`.

    Args:
        model: a spaCy pipeline with named entities, installed, or its folder.
        language: of the texts, two letters.

    Raises:
        ImportError: Presidio is not installed.
        ValueError: there is no such pipeline (Presidio itself would try to download it), or it
            finds no entities.
    """
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError as error:
        raise ImportError(
            'presidio_model needs presidio-analyzer, which is not installed; run: pip install "'
            'genrec[pii]"'
        ) from error
    if not (spacy.util.is_package(model) or Path(model).is_dir()):
        raise ValueError(
            f"presidio_model={model} is no installed spaCy pipeline and no folder of one; run: "
            f"python -m spacy download {model}"
        )
    try:
        engine = SpacyNlpEngine([{"lang_code": language, "model_name": model}])
        engine.load()
    except OSError as error:
        raise ValueError(f"presidio_model={model} can't be loaded: {error}") from error
    assert engine.nlp is not None, "it was loaded"
    if not {"ner", "entity_ruler"} & set(engine.nlp[language].pipe_names):
        raise ValueError(f"presidio_model={model} finds no entities: it has neither ner nor rules")
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=list(ENTITIES))
    registry = RecognizerRegistry([recognizer], supported_languages=[language])
    analyzer = AnalyzerEngine(registry, engine, supported_languages=[language])

    def find(text: str) -> list[tuple[int, int, str]]:
        found = analyzer.analyze(text, language, entities=list(ENTITIES))
        return [(one.start, one.end, ENTITIES[one.entity_type]) for one in found]

    return find
