/* net_store.h - a simulated node's part in the store that nodes share: see net_store.c. */
#ifndef NET_STORE_H
#define NET_STORE_H

#include "net.h"

struct net_file;

/* Where the node has a store; else they do nothing. */
void net_store_open(struct net_world *w, struct net_node *p);
void net_store_space(struct net_world *w, struct net_node *p, uint32_t space);
void net_store_close(struct net_world *w, struct net_node *p);  /* in time, if it leaves; as by kill -9 else */
void net_store_free(struct net_node *p);                        /* after that */
void net_store_round(struct net_world *w, struct net_node *p);
uint64_t net_store_next(struct net_world *w, const struct net_node *p);
void net_store_tell(struct net_world *w, struct net_node *p);   /* what is in p->untold */
void net_store_used(struct net_world *w, struct net_node *p, uint32_t space, uint32_t ns, const struct fk_key *keys, uint32_t n);
void net_store_reset(struct net_world *w, struct net_node *p);
bool net_store_hand_on(void *ctx, const struct fk_core_fetch *want);
/* How far the node, its peers and the store reach. */
uint32_t net_store_reach(struct net_world *w, struct net_node *p, uint32_t space, const struct fk_key *keys, uint32_t n,
                         uint32_t known);
bool net_store_at_rest(const struct net_node *p);
void net_store_check(struct net_world *w, struct net_node *p);  /* now and then */
void net_store_check_quiet(struct net_world *w);

/* net_watch.c */
struct net_fetch *net_fetch_of(struct net_node *p, uint64_t id);
struct net_fetch *net_fetch_into(struct net_node *p, const void *buffer);
/* net_place.c */
void net_file_closed(struct net_node *p, struct net_file *f);

#endif
