"""tiedkl in other libraries, one module or package for each; none is imported by `import tiedkl`."""
