"""The batch job: directories, lists and buckets of unknown files -> one Parquet record per face or failure."""
