"""Models and methods. The files are flat and import each other with single dots: a hub repository carries them."""
