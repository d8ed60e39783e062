"""Pages are never lost, never given twice, and remembered as long as there is room."""

import numpy as np
import pytest

from dsjax.inference.pages import PagePool, page_keys


def test_a_key_speaks_of_everything_up_to_its_page():
    tokens = list(range(20))
    keys = page_keys(tokens, 4)
    assert len(keys) == len(set(keys)) == 5
    assert page_keys(tokens[:18], 4) == keys[:4]
    changed = page_keys([99, *tokens[1:]], 4)
    assert not set(changed) & set(keys)
    assert page_keys(tokens, 4, keys[:3]) == keys


def test_pages_are_given_once_until_none_are_left():
    pool = PagePool(5, 4)
    taken = [pool.take() for _ in range(5)]
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert pool.take() is None
    pool.release(taken[:2])
    assert pool.available == 2
    assert {pool.take(), pool.take()} == set(taken[:2])


def test_the_beginning_longest_unused_is_forgotten_first_and_from_its_end():
    pool = PagePool(4, 2)
    old, new = page_keys([1, 2, 3, 4], 2), page_keys([5, 6, 7, 8], 2)
    for keys in (old, new):
        pages = [pool.take(), pool.take()]
        for page, key in zip(pages, keys, strict=True):
            pool.remember(page, key)
        pool.release(pages)
    assert (len(pool.find(old)), len(pool.find(new)), pool.available) == (2, 2, 4)
    pool.take()
    assert (len(pool.find(old)), len(pool.find(new))) == (1, 2)
    pool.take()
    assert (len(pool.find(old)), len(pool.find(new))) == (0, 2)


def test_a_page_in_use_is_never_forgotten():
    pool = PagePool(2, 2)
    keys = page_keys([1, 2], 2)
    page = pool.take()
    pool.remember(page, keys[0])
    pool.share([page])
    pool.release([page])
    assert pool.take() != page
    assert pool.take() is None
    assert pool.find(keys) == [page]


@pytest.mark.parametrize("seed", range(5))
def test_after_any_history_every_page_is_somewhere(seed):
    """Against a plain model: a page is in use by whoever took or shared it, or available."""
    rng = np.random.default_rng(seed)
    pool, held = PagePool(12, 2), []
    texts = [rng.integers(0, 2, 8).tolist() for _ in range(4)]
    for _ in range(400):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.integers(len(held))))
            continue
        keys = page_keys(texts[rng.integers(4)], 2)
        pages = pool.find(keys)
        pool.share(pages)
        while len(pages) < 4 and (page := pool.take()) is not None:
            pages = [*pages, page]
            pool.remember(page, keys[len(pages) - 1])
        held.append(pages)
        in_use = {page for pages in held for page in pages}
        assert pool.available == 12 - len(in_use)
    for pages in held:
        pool.release(pages)
    assert pool.available == 12
