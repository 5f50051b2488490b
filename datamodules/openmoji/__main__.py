"""Makes the embedded data set. Run once before training:

python -m nextflow.datamodules.openmoji --config configs/openmoji/data_all.yaml
"""

from nextflow.datamodules.openmoji.dataset import OpenMojiConfig, make_openmoji


def main() -> None:
    """Command line: every field of `OpenMojiConfig`, from a YAML file or as options."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.openmoji", description=OpenMojiConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(OpenMojiConfig)
    config = parser.instantiate(parser.parse_args()).as_dict()
    config.pop("config")
    try:
        report = make_openmoji(OpenMojiConfig(**config))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:  # the user's to mend, in one line
        raise SystemExit(f"error: {error}") from error
    splits = ", ".join(f"{count} {split}" for split, count in report["splits"].items())
    for kind, count in report["kinds"].items():
        print(f"{config['output']}/{kind}: {', '.join(f'{number} {split}' for split, number in count.items())}")
    print(f"{config['output']}: {splits}; text tokenizer of {report['text_tokenizer']['size']} ids")
    for reason, keys in report["skipped"].items():
        print(f"skipped {len(keys)} drawings: {reason}")


if __name__ == "__main__":
    main()
