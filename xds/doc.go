// Package xds is a delta ADS client: it holds the desired subscriptions, hands
// each response to the handler of its type, acks or nacks it, and replays what
// it knows when the stream is made again.
//
// It knows the envelope only. What a resource means is the handler's business:
//
//	c, err := xds.New(xds.Config{Address: "istiod.istio-system.svc:15012", Node: node, Log: log,
//		Subscriptions: []xds.Subscription{
//			{Type: xds.AddressType, Handler: store.Addresses()},
//			{Type: xds.AuthorizationType, Handler: store.Authorizations()},
//		}})
//	go c.Run(ctx)
//	<-c.Ready()
//
// Run owns the stream and calls the handlers from one goroutine, so a handler
// never runs twice at a time. Ready and Stats may be called from anywhere.
//
// Memory is bounded against a hostile server: a message is at most 200 MiB, and
// what exceeds Config.Limits is rejected resource by resource.
package xds
