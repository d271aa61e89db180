"""The words with which the tiny checkpoint describes a region, by attribute; longer ones before those they contain."""

WORDS = {
    "colour": ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"),
    "size": ("tiny", "small", "medium", "large"),
    "position": (
        *("top left", "top right", "bottom left", "bottom right"),
        *("top", "left", "centre", "right", "bottom"),
    ),
    "shape": ("round", "square", "elongated", "irregular"),
    "texture": ("plain", "textured"),
}
