/* table.h - private to src/index: the hash table's bucket operations (table.c). */
#ifndef FK_INDEX_TABLE_H
#define FK_INDEX_TABLE_H

#include "index/index.h"

/* Sets up a table for n entries and puts the live ones in; keeps the old one on failure. */
int fk_table_resize(struct fk_index *ix, uint32_t n);
void fk_table_insert(struct fk_index *ix, uint32_t entry);
void fk_table_erase(struct fk_index *ix, uint32_t entry);
/* Memory in huge pages where the kernel has them; zeroed. NULL: none. */
void *fk_index_map(size_t bytes);

#endif
