"""The Streamlit app: a thin front on the predictor, and on the outputs of the batch job."""
