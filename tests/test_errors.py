from miinb import errors


def test_tree_of_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = {
        line.strip("│├└─ ").split("(")[0].split()[0] for line in (errors.__doc__ or "").splitlines()[2:] if line.strip()
    }
    assert drawn == {*errors.all_errors(), "Interrupted"}


def test_an_error_renders_as_one_line_with_its_hint() -> None:
    error = errors.UnknownOption("There is no option 'dtyp'.", hint="Did you mean 'dtype'?")
    assert error._render_traceback_() == ["UnknownOption: There is no option 'dtyp'. Did you mean 'dtype'?"]


def test_an_unknown_error_name_keeps_its_text() -> None:
    assert "Weird: text" in str(errors.from_name("Weird", "text"))
    assert isinstance(errors.from_name("QueueFull", "text"), errors.QueueFull)
