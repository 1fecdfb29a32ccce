"""The demo corpus: the same everywhere, and held-out text that training really never shows."""

import hashlib
import re
from itertools import islice

from blocks.demo_training.corpus import ASSISTANT, BEGIN, END, USER, documents, is_held_out

COUNT = 1500


def test_the_corpus_never_changes() -> None:
    digest = hashlib.sha256()
    for held_out in (False, True):
        for document in islice(documents(1, held_out=held_out), 300):
            digest.update(document.text.encode())
    # Another digest is another corpus: train the demo model again and say so in docs/demo-model.md.
    assert digest.hexdigest() == PINNED


def test_training_never_shows_a_held_out_combination() -> None:
    shown = {
        combination for document in islice(documents(1, held_out=False), COUNT) for combination in document.combinations
    }
    assert len(shown) > 1000
    assert not any(map(is_held_out, shown))


def test_held_out_documents_ask_for_something_never_shown() -> None:
    for document in islice(documents(2, held_out=True), COUNT):
        assert any(map(is_held_out, document.combinations))


def test_no_document_is_in_both_sets() -> None:
    training = {document.text for document in islice(documents(1, held_out=False), COUNT)}
    held_out = {document.text for document in islice(documents(1, held_out=True), COUNT)}
    assert not training & held_out
    assert len(held_out) > 0.98 * COUNT  # it is a grammar, not a list


def test_documents_have_the_form_that_the_chat_template_writes() -> None:
    turn = f"{re.escape(USER)}[^<]+{re.escape(END)}{re.escape(ASSISTANT)}[^<]+{re.escape(END)}"
    form = re.compile(f"{re.escape(BEGIN)}([^<]+{re.escape(END)}|(<.system.>[^<]+{re.escape(END)})?({turn})+)")
    for document in islice(documents(3, held_out=False), COUNT):
        assert form.fullmatch(document.text), document.text


def test_every_story_and_answer_is_whole_sentences_with_nothing_left_to_fill_in() -> None:
    for document in islice(documents(4, held_out=False), COUNT):
        texts = re.findall(f"{re.escape(ASSISTANT)}([^<]+)<", document.text) or [document.text[len(BEGIN) : -len(END)]]
        for text in texts:
            assert not re.search(r"[{}<>]|  | [.,!?]|\ba [aeio]", text), text
            assert text[-1] in '.!?"', text
            assert text[0].isupper() or text[0] == '"' or ASSISTANT not in document.text, text


PINNED = "95d2111a1ee2f4e84cd4622cea39ff0b26b3c6f62e734963ee5ab2de43c0294e"
