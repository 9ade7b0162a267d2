"""Numbers with the words that agree with them."""

from model.wording import counted


def test_words_agree_with_the_number():
    assert [counted(number, "stay") for number in (0, 1, 2, 1200)] == ["0 stays", "1 stay", "2 stays", "1,200 stays"]
    assert (
        counted(1, "stay has", "stays have") == "1 stay has" and counted(2, "stay has", "stays have") == "2 stays have"
    )
