"""The herd: configuration, model family, data and reports that every room of the workbench stands on."""
