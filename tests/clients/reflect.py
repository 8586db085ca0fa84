"""A client that knows nothing of Strata but an address: services, messages and methods come from server reflection.

usage: python reflect.py HOST:PORT [--prompt TEXT] [--max-tokens N] [--hang-up N]

Prints one JSON line with the services, checks health, then one line per event of a Generate call. With --hang-up it
cancels the call after N events that carry tokens.
"""
import argparse
import json
import sys

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT = 60


def check_health(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "strata.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            sys.exit(f"health of {service!r} is {answer.status}, not SERVING")


def generate(channel, pool, prompt, max_tokens):
    try:
        method = pool.FindServiceByName("strata.v1.Inference").FindMethodByName("Generate")
    except KeyError as error:
        sys.exit(f"reflection does not describe strata.v1.Inference/Generate: {error}")
    request = GetMessageClass(method.input_type)(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    answer = GetMessageClass(method.output_type)
    call = channel.unary_stream("/strata.v1.Inference/Generate", request_serializer=type(request).SerializeToString,
                                response_deserializer=answer.FromString)
    return call(request, timeout=TIMEOUT)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--prompt", default="ROMEO:\n")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--hang-up", type=int)
    args = parser.parse_args()
    with grpc.insecure_channel(args.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        print(json.dumps({"services": sorted(database.get_services())}), flush=True)
        check_health(channel)
        call = generate(channel, DescriptorPool(database), args.prompt, args.max_tokens)
        seen = 0
        for event in call:
            print(json.dumps(json_format.MessageToDict(event, preserving_proto_field_name=True)), flush=True)
            seen += event.HasField("tokens")
            if args.hang_up is not None and seen >= args.hang_up:
                call.cancel()
                return
    if args.hang_up is not None:
        sys.exit("the answer ended before it was time to hang up")


try:
    main()
except grpc.RpcError as error:
    sys.exit(f"{error.code()}: {error.details()}")
