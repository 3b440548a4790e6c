"""Where models and data come from: a leaf that knows other libraries by name, which nothing below the command line imports."""
