"""The data that the guard's classifier will be trained on: folds by source, splits, made-up texts, figures."""
