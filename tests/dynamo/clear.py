"""Calls the endpoint clear_kv_blocks of one worker, which the front end does not show:

    python clear.py INSTANCE        (the folder of a deployment with --form file in DYN_FILE_KV)
"""
import asyncio
import sys

from dynamo.runtime import DistributedRuntime


async def main(instance):
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    client = await runtime.endpoint("dynamo.backend.clear_kv_blocks").client()
    await client.wait_for_instances()
    async for answer in await client.direct({}, instance):
        print(answer.data())
    runtime.shutdown()


asyncio.run(asyncio.wait_for(main(int(sys.argv[1])), 60))
