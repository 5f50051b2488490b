import pickle

import pytest

from nextflow.sequence.text_tokenizer import END, START, TextTokenizer, load_text_tokenizer, train_text_tokenizer

TEXTS = ["red apple", "woman running, medium skin tone", "flag of åland islands"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_tokenizer")
    train_text_tokenizer(TEXTS * 3, folder, 300)
    return folder


@pytest.mark.parametrize("text", [*TEXTS, "never seen: Ω 你好 \n two  spaces .", " leading", ""])
def test_decode_inverts_encode_for_any_text(folder, text):
    tokenizer = load_text_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.size for index in ids)


def test_specials_are_neither_encoded_nor_decoded(folder):
    tokenizer = load_text_tokenizer(folder)
    assert (tokenizer.start_id, tokenizer.end_id) == (0, 1)
    ids = tokenizer.encode("red apple")
    assert tokenizer.start_id not in ids and tokenizer.end_id not in ids
    assert tokenizer.decode([tokenizer.start_id, *ids, tokenizer.end_id]) == "red apple"


def test_training_shortens_what_it_saw(folder):
    assert len(load_text_tokenizer(folder).encode("red apple")) < len("red apple")


@pytest.mark.parametrize(
    "travel", [lambda t: TextTokenizer.from_json(t.to_json()), lambda t: pickle.loads(pickle.dumps(t))]
)
def test_it_travels_as_json(folder, travel):
    tokenizer = load_text_tokenizer(folder)
    arrived = travel(tokenizer)
    for text in TEXTS:
        assert arrived.encode(text) == tokenizer.encode(text)
    assert (arrived.size, arrived.start_id, arrived.end_id) == (tokenizer.size, tokenizer.start_id, tokenizer.end_id)
    assert arrived.fingerprint() == tokenizer.fingerprint()


def test_the_fingerprint_tells_tokenizers_apart(folder, tmp_path):
    other = train_text_tokenizer(["something else"], tmp_path, 280)
    assert other.fingerprint() != load_text_tokenizer(folder).fingerprint()


def test_without_bos_the_end_token_starts(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token="a"))
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END))
    assert tokenizer.start_id == tokenizer.end_id == 1
    with pytest.raises(ValueError, match="eos_token"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words))


def test_a_missing_folder_names_the_key(tmp_path):
    with pytest.raises(FileNotFoundError, match="text_tokenizer"):
        load_text_tokenizer(tmp_path)


def test_a_size_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="258"):
        train_text_tokenizer(TEXTS, tmp_path, 100)
    assert START != END
