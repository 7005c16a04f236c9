"""What a report is made of: results and training curves read from disk, sentences, plots in four versions, HTML."""
