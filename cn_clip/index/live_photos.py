"""Live Photos: a picture and, beside it and of the same name, the three seconds around it as a video."""

import posixpath
from collections.abc import Iterable, Mapping

STILL_SUFFIXES, MOVIE_SUFFIX = (".heic", ".heif", ".jpg", ".jpeg"), ".mov"
# Phones write 2 to 10 MB; a longer film that shares its name with a picture is a film.
MOST_BYTES = 32 << 20


def other_halves(stills: Iterable[str], movies: Mapping[str, int]) -> dict[str, str]:
    """Picture -> video of each Live Photo; movies: their sizes in bytes.

    Cases do not matter: of a/IMG_1.HEIC the other half is a/IMG_1.MOV or a/img_1.mov, not b/IMG_1.MOV.
    """
    named = {
        stem.casefold(): movie
        for movie, size in movies.items()
        for stem, suffix in [posixpath.splitext(movie)]
        if suffix.lower() == MOVIE_SUFFIX and size <= MOST_BYTES
    }
    found = {}
    for still in stills if named else ():
        stem, suffix = posixpath.splitext(still)
        if suffix.lower() in STILL_SUFFIXES and stem.casefold() in named:
            found[still] = named[stem.casefold()]
    return found
