// header_cpp.cc - the public header compiles as C++ with all warnings, and links against the shared
// library: names are not mangled. Opens and closes a node.
#include <flexkv/flexkv.h>

#include <cstdio>

int main()
{
    flexkv_config *config = nullptr;
    flexkv_node *node = nullptr;
    flexkv_stats stats = flexkv_stats();

    if (flexkv_config_create(&config) != 0 ||
        flexkv_config_set(config, "cpu_cache_gb", "1M") != 0 ||
        flexkv_node_open(config, &node) != 0) {
        std::fprintf(stderr, "%s\n", flexkv_last_error());
        return 1;
    }
    stats.struct_bytes = sizeof(stats);
    int rc = flexkv_node_stats(node, &stats);
    flexkv_node_close(node);
    flexkv_config_destroy(config);
    return rc != 0 || !*flexkv_version() || stats.blocks != 0;
}
