"""One file per format, installed as `edgekd.export`: each holds one module-level object named `exporter`."""

if __name__ != "edgekd.export":
    raise ImportError("this folder is the package 'edgekd.export' and cannot be imported as '" + __name__ + "': use `import edgekd.export`")
