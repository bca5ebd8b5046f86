// Package mesh is the world as the control plane tells it: workloads, services
// and policies, and where a connection goes. It dials nothing.
//
//	store := mesh.NewStore(mesh.Config{LocalNode: "node-a"})
//	// give store.Addresses() and store.Authorizations() to an xds.Client
//	src, err := store.WaitLocal(ctx, "client", "default", "client")
//	route, err := store.Snapshot().Resolve(src, dst)
//
// A Snapshot is immutable and may be read by any number of goroutines without
// a lock; two answers that must agree come from one Snapshot. An update copies
// only the paths of the maps that it touches (see pmap), so its cost does not
// grow with the size of the mesh.
//
// Endpoints are not stored: a service's endpoints are the workloads that name
// it, so health policies, staging before the service arrives and replacement
// need no bookkeeping that could go stale.
//
// Waypoints, network gateways and workloads that only have a host name are
// known and not supported yet: Resolve refuses them with an UnsupportedError
// and never goes around them.
package mesh
