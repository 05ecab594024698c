"""An S3 server that is not ours (moto's), and what tests do behind its clients' backs. In the environment of tools/s3-env.

  s3.py serve [PORT [locked]]      a bucket `flexkv-test` on a port (0: a free one) of the loopback; says the port, runs until
                                   killed. locked: for those alone who have the key that it says
  s3.py spoil PORT PREFIX N        flips a bit in N blocks under PREFIX/data
  s3.py drop PORT PREFIX           removes all blocks under PREFIX/data (not the logs)
  s3.py empty PORT PREFIX          removes all objects
  s3.py list PORT PREFIX           names of all objects
"""
import sys
import threading

BUCKET = "flexkv-test"


def client(port, service="s3"):
    import boto3
    return boto3.client(service, endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                        aws_access_key_id="test", aws_secret_access_key="test")


def lock(port):
    """From now on the server looks who asks. A key of one who may do all in S3."""
    import json
    from moto import settings
    iam = client(port, "iam")
    iam.create_user(UserName="node")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="node", PolicyName="all", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="node")["AccessKey"]
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    return key["AccessKeyId"], key["SecretAccessKey"]


def names(s3, prefix):
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [o["Key"] for page in pages for o in page.get("Contents", [])]


def blocks(s3, prefix):
    return [n for n in names(s3, f"{prefix}/data/") if not n.rsplit("/", 1)[1].startswith("log-")]


def spoil(s3, name, at=5000):
    body = bytearray(s3.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    body[at] ^= 1
    s3.put_object(Bucket=BUCKET, Key=name, Body=bytes(body))


def serve(port=0, locked=""):
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(port), verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client(port).create_bucket(Bucket=BUCKET)
    print(port, *(lock(port) if locked else ()), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "serve":
        serve(*rest)
    s3 = client(rest[0])
    if what == "spoil":
        chosen = blocks(s3, rest[1])[:int(rest[2])]
        for name in chosen:
            spoil(s3, name)
        sys.exit(len(chosen) != int(rest[2]))
    elif what == "drop":
        for name in blocks(s3, rest[1]):
            s3.delete_object(Bucket=BUCKET, Key=name)
    elif what == "empty":
        for name in names(s3, rest[1]):
            s3.delete_object(Bucket=BUCKET, Key=name)
    elif what == "list":
        print("\n".join(names(s3, rest[1])))
