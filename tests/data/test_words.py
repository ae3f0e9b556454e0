from rtpurbo.data.words import ADJECTIVES, NAMES, NOUNS, key_names


def test_words_are_plain_and_unique():
    for words in (ADJECTIVES, NOUNS, NAMES):
        assert len(set(words)) == len(words)
        assert all(word.isascii() and word.isalpha() for word in words)
    assert not set(ADJECTIVES) & set(NOUNS)


def test_splits_share_no_word():
    train, test = key_names("train"), key_names("test")
    assert len(set(train)) == len(train) > 2000
    assert len(set(test)) == len(test) > 2000
    words = [{word for key in keys for word in key.split("-")} for keys in (train, test)]
    assert not words[0] & words[1]
