"""Buckets: gs:// (Google Cloud Storage) and s3:// (Amazon S3 and what speaks its protocol), through fsspec.

client     single objects and listings: one line for every failure, and retries
copies     a model or tokenizer in a bucket, copied into the local cache; a converted folder, copied to a bucket
workdirs   a workdir in a bucket: a local folder that is copied to the bucket while the run goes on

Data sets are not copied: `client.opened` streams them. Credentials are those of the cloud's own tools, for S3 also
AWS_ENDPOINT_URL (another server) and AWS_REGION.
"""

from lcx.buckets.client import is_url

__all__ = ["is_url"]
