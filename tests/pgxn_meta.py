"""Validates the META.json of an archive for PGXN: with the types of PGXN's own client, which
raise an error for what they do not take, and against the files of the archive."""

import sys

from pgxnclient import SemVer, archive
from pgxnclient.spec import Spec
from pgxnclient.utils.strings import Term

# What PGXN's specification requires.
REQUIRED = {
    "name", "version", "abstract", "maintainer", "license", "provides", "meta-spec"
}


def check(holds, what):
    if not holds:
        raise ValueError(what)


def main(file):
    zipped = archive.from_file(file)
    meta = zipped.get_meta()
    missing = REQUIRED - meta.keys()
    check(not missing, f"missing: {missing}")
    directory = f"{Term(meta['name'])}-{SemVer(meta['version'])}/"
    check(meta["meta-spec"]["version"] == "1.0.0", "another version of the specification")
    check(meta["release_status"] in Spec.STATUS, "no release status")
    for tag in meta["tags"]:
        check(0 < len(tag) < 256 and not set(tag) & set("/\\"), f"not a tag: {tag!r}")
    for phase in meta["prereqs"].values():
        for versions in phase.values():
            for name, version in versions.items():
                Term(name)
                SemVer(version)

    zipped.open()
    files = zipped.list_files()
    check(all(name.startswith(directory) for name in files), f"not all is in {directory}")
    check(f"{directory}META.json" in files, "META.json is not at the top")
    for name, extension in meta["provides"].items():
        Term(name)
        SemVer(extension["version"])
        for key in ("file", "docfile"):
            check(directory + extension[key] in files, f"{key} is not in the archive")
        control = zipped.read(f"{directory}{name}.control").decode()
        version = extension["version"].rsplit(".", 1)[0]
        check(f"default_version = '{version}'" in control, "the control file has another version")
    zipped.close()


main(sys.argv[1])
