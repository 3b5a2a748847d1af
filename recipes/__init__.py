"""One YAML per complete run, installed as `edgekd.recipes`: the recipes that `--recipe` knows by name."""

if __name__ != "edgekd.recipes":
    raise ImportError("this folder is the package 'edgekd.recipes' and cannot be imported as '" + __name__ + "': use `import edgekd.recipes`")
