"""One YAML per device, installed as `edgekd.profiles`: the targets that `--target` knows by name."""

if __name__ != "edgekd.profiles":
    raise ImportError("this folder is the package 'edgekd.profiles' and cannot be imported as '" + __name__ + "': use `import edgekd.profiles`")
